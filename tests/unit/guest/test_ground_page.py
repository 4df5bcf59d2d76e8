"""The page that ``make test-ground`` writes: rows are kept, replaced and ordered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.ground.page import NO_QEMU, Row, read_rows, renew

OLD = Row("7.2.22", "6.1.0-50", "guests", 90, 0, 1, 30, 300, "2026-11-01")
NEW = Row("11.1.3", "7.3.4", "guests", 80, 2, 1, 25, 400, "2026-11-30")
NESTED = replace(NEW, tests="nested", passed=10)
UML = replace(NEW, qemu=NO_QEMU, linux="6.1.176", tests="uml")
OTHER = Row("10.0.13", "6.12.117", "guests", 1, 0, 0, 1, 1, "2026-11-30")


def test_the_page_holds_the_rows_that_were_measured_by_version(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert read_rows(page) == []
    renew(page, [NESTED, NEW, UML, OTHER, OLD])
    assert read_rows(page) == [UML, OLD, OTHER, NEW, NESTED]


def test_a_cell_that_is_measured_again_replaces_its_row_and_no_other(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    renew(page, [OLD, NEW, NESTED])
    later = replace(NEW, qemu="11.1.4", linux="7.3.9", failed=0, date="2026-12-24")
    renew(page, [later])
    assert read_rows(page) == [OLD, later, NESTED]


def test_other_series_are_other_cells(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    renew(page, [NEW])
    renew(page, [replace(NEW, linux="7.30.4")])
    assert [row.linux for row in read_rows(page)] == ["7.3.4", "7.30.4"]
