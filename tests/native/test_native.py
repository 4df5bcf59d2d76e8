"""The C of the data plane and of the virtual machine, without Python, under ASan with UBSan and under TSan.

Each ``test_*.c`` here is a program that ends with 0 when all its promises held, or with 77 when the machine lacks what
it needs; ``make -C tests/native check`` runs
the same. Objects are kept in the tree's cache, so only what changed is compiled again.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / ".cache" / "native"
SKIPPED = 77  # check.h
PROGRAMS = sorted(path.stem for path in HERE.glob("test_*.c"))
# No suppressions, in either of them.
OPTIONS = {
    "asan": {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1"},
}


@pytest.fixture(scope="session")
def built() -> Path:
    """Both builds of every program."""
    made = subprocess.run(["make", "-C", HERE, f"BUILD={BUILD}", "-j2", "all"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return BUILD


@pytest.mark.parametrize("sanitizer", sorted(OPTIONS))
@pytest.mark.parametrize("program", PROGRAMS)
def test_our_c_keeps_its_promises_under_the_sanitizers(built: Path, program: str, sanitizer: str) -> None:
    folder = built / sanitizer
    ran = subprocess.run(
        [folder / program],
        cwd=folder,
        env=os.environ | OPTIONS[sanitizer],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    if ran.returncode == SKIPPED:
        pytest.skip(ran.stdout.strip().splitlines()[-1])
    assert ran.returncode == 0, ran.stdout
