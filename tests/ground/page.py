"""The page of what works with what: rows of measured cells, each with its date, renewed one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

HEAD = """\
# What works with what

Written by `make test-ground`, which boots Debian's kernels under Debian's QEMUs, fetched and not installed, and runs
the tests that need them: `guests` is tests/guests, `nested` tests/nested, `levels` a guest of a guest of a guest. In
these two the kernel is that of all levels. `libvirt` is a domain with a device of every type that a real libvirtd
starts. `uml` is User-mode Linux, which has no QEMU: built of Debian's kernel source with a driver for every type of
device, it uses one of each. `uml-debian` is tests/guests/test_uml.py with Debian's own User-mode Linux.
A row is as old as its date. `make test-ground ARGS="--qemu 11.1 --kernel 7.3"` renews one.

"""
COLUMNS = ("QEMU", "Linux", "tests", "passed", "failed", "skipped", "guests booted", "seconds", "date")
NUMERIC = COLUMNS[3:8]
NO_QEMU = "none"  # User-mode Linux has none


@dataclass(frozen=True)
class Row:
    """One cell of the matrix, as it was measured; versions as Debian has them."""

    qemu: str
    linux: str
    tests: str
    passed: int
    failed: int
    skipped: int
    booted: int
    seconds: int
    date: str

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """A later row with the same key replaces this one: only a stable update differs."""
        return _series(self.qemu), _series(self.linux), self.tests

    def __str__(self) -> str:
        return f"| {' | '.join(map(str, astuple(self)))} |"


def _series(version: str) -> tuple[int, ...]:
    if version == NO_QEMU:
        return ()
    return tuple(int(part) for part in version.split(".")[:2])


def table(rows: Iterable[Row]) -> str:
    """The rows in order, as Markdown."""
    rules = ("---:" if name in NUMERIC else "---" for name in COLUMNS)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(rules)}|", *map(str, sorted(rows, key=lambda row: row.key))]
    return "\n".join(lines)


def read_rows(page: Path) -> list[Row]:
    """The rows that the page has; none if it is not there."""
    text = page.read_text() if page.exists() else ""
    rows = []
    for line in text.splitlines():
        words = line.strip("| ").split(" | ")
        if len(words) == len(COLUMNS) and (words[0] == NO_QEMU or words[0][0].isdigit()):
            passed, failed, skipped, booted, seconds = map(int, words[3:8])
            rows.append(Row(words[0], words[1], words[2], passed, failed, skipped, booted, seconds, words[8]))
    return rows


def renew(page: Path, measured: Iterable[Row]) -> None:
    """Write the page with ``measured`` in the place of older rows of the same cells."""
    rows = {row.key: row for row in [*read_rows(page), *measured]}
    page.write_text(f"{HEAD}{table(rows.values())}\n")
