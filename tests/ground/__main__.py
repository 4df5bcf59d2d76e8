"""Run the guest tests over the matrix of Debian's QEMUs and kernels, none of them installed; ``make test-ground``.

Words that are no option of ours go to pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from guest.boot import uml, uml_kernel
from guest.boot.uml import SERIES_VARIABLE, prepare_uml
from guest.boot.uml_kernel import prepare_uml_kernel
from guest.debian.cache import PrepareError
from guest.debian.kernel import SUITE_VARIABLE, prepare_kernel
from guest.debian.qemu import PROGRAM, prepare_qemu
from guest.debian.suites import open_suite
from tests.ground.page import NO_QEMU, Row, renew, table

PROJECT = Path(__file__).resolve().parents[2]
PAGE = PROJECT / "docs" / "works-with.md"
QEMUS = {"7.2": "bookworm", "10.0": "trixie", "11.1": "trixie-backports"}
KERNELS = {"6.1": "bookworm", "6.12": "trixie", "7.3": "trixie-backports"}
# Beside the matrix: guests in guests, each kernel once, under the QEMU of its own suite.
NESTED = {"6.12": "10.0", "7.3": "11.1"}
# And a guest of a guest of a guest with the module at each level, likewise.
LEVELS = NESTED
TESTS = {
    "guests": ("-m", "not nested_full and not ground", "tests/guests"),  # with the cases marked guest_full
    "nested": ("tests/nested",),
    "levels": (
        "-m",
        "nested or nested_full",
        "tests/nested/test_plain_doorbells.py",
        "tests/nested/test_guests_of_guests.py",
    ),
    "libvirt": ("-m", "ground", "tests/guests/test_libvirt.py"),
    "uml": ("-m", "ground", "tests/guests/test_uml_kernel.py"),
    "uml-debian": ("tests/guests/test_uml.py",),
}
# Of libvirt one cell: it and its QEMU are those of one suite (tests/guests/test_libvirt.py).
LIBVIRT = ("11.1", "7.3", "libvirt")
# Over the CPUs, as in the Makefile's `test`.
SHARED_OUT = ("--numprocesses", "auto", "--maxprocesses", "4", "--no-loadscope-reorder")
# User-mode Linux, which has no QEMU: kernels that are built with all drivers, and Debian's own that make test has not.
UML = [(NO_QEMU, series, "uml") for series in uml_kernel.SUITES]
UML += [(NO_QEMU, series, "uml-debian") for series in uml.SUITES if series != uml.SERIES]
CANNOT_BE_HAD = 2


@dataclass(frozen=True)
class Place:
    """What a cell runs with: versions as the table has them, and the environment that chooses them."""

    qemu: str
    linux: str
    environment: dict[str, str]


def prepare_place(qemu: str, kernel: str, tests: str) -> Place:
    """Raises ``PrepareError`` where its programs cannot be had."""
    if qemu == NO_QEMU:
        found = (prepare_uml_kernel if tests == "uml" else prepare_uml)(print, kernel)
        said = subprocess.run([found.image, "--version"], capture_output=True, text=True, check=True).stdout
        return Place(qemu, said.strip(), {**os.environ, SERIES_VARIABLE: kernel})
    place = prepare_qemu(open_suite(QEMUS[qemu], print))
    release = prepare_kernel(print, suite=KERNELS[kernel]).release
    environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", SUITE_VARIABLE: KERNELS[kernel]}
    said = subprocess.run([place / PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\S+)", said)
    return Place(
        version[1] if version else qemu,
        re.split(r"[+-]", release)[0] if kernel != "6.1" else release.removesuffix("-cloud-amd64"),
        environment,
    )


def run_cell(qemu: str, kernel: str, tests: str, further: Sequence[str]) -> Row:
    """One cell: its row. Raises ``PrepareError`` where its programs cannot be had, or pytest ran no test."""
    place = prepare_place(qemu, kernel, tests)
    print(f"== {tests} with QEMU {qemu} and Linux {place.linux}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hyperbell-ground-") as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *SHARED_OUT, *TESTS[tests]]
        run = subprocess.Popen(
            [*command, *further], cwd=PROJECT, env=place.environment, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert run.stdout is not None
        with run, run.stdout:
            lines = [line for line in run.stdout if not print(line, end="", flush=True)]
        if not report.exists():
            raise PrepareError(f"pytest ended with status {run.returncode} and left no report")
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    booted = re.search(r"^guests booted: (\d+)", "".join(lines), re.MULTILINE)
    return Row(
        qemu=place.qemu,
        linux=place.linux,
        tests=tests,
        passed=counts["tests"] - failed - counts["skipped"],
        failed=failed,
        skipped=counts["skipped"],
        booted=int(booted.group(1)) if booted else 0,
        seconds=round(time.monotonic() - begin),
        date=datetime.now(UTC).date().isoformat(),
    )


def main() -> int:
    linuxes = sorted({*KERNELS, *uml.SUITES, *uml_kernel.SUITES}, key=lambda series: [*map(int, series.split("."))])
    parser = argparse.ArgumentParser(prog="make test-ground", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--qemu", action="append", choices=QEMUS, help="only with this QEMU (may be repeated)")
    parser.add_argument("--kernel", action="append", choices=linuxes, help="only with this Linux (may be repeated)")
    parser.add_argument("--tests", action="append", choices=TESTS, help="only these tests (may be repeated)")
    parser.add_argument("--no-page", action="store_true", help=f"leave {PAGE.relative_to(PROJECT)} as it is")
    options, further = parser.parse_known_args()
    cells = [(qemu, kernel, "guests") for qemu in QEMUS for kernel in KERNELS]
    cells += [(qemu, kernel, "nested") for kernel, qemu in NESTED.items()]
    cells += [(qemu, kernel, "levels") for kernel, qemu in LEVELS.items()]
    cells += [LIBVIRT, *UML]
    chosen = [
        (qemu, kernel, tests)
        for qemu, kernel, tests in cells
        if qemu in (options.qemu or [*QEMUS, NO_QEMU])
        and kernel in (options.kernel or linuxes)
        and tests in (options.tests or TESTS)
    ]
    if not chosen:
        parser.error("no cell of the matrix is all of that")
    rows: list[Row] = []
    missing: list[str] = []
    for cell in chosen:
        try:
            rows.append(run_cell(*cell, further))
        except PrepareError as error:
            missing.append(f"{' '.join(cell)}: {error}")
    print(f"\n{table(rows)}\n")
    for line in missing:
        print(f"not run: {line}")
    # What was chosen among the tests says nothing of a cell.
    if not options.no_page and not further:
        renew(PAGE, rows)
        print(f"written to {PAGE.relative_to(PROJECT)}")
    if missing:
        return CANNOT_BE_HAD
    return 1 if any(row.failed or not row.booted for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
