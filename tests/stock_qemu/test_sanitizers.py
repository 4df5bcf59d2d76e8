"""The library's own code in a program under AddressSanitizer with UBSan, and under ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "transports" / "stock_qemu" / "library"
FLAGS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
# No suppressions, in either of them.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


@pytest.mark.parametrize("sanitizer", sorted(FLAGS))
def test_the_library_keeps_its_promises_under_the_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    program = tmp_path / "sanitized"
    sources = [
        HERE / "sanitized.c",
        *(path for path in SOURCES.glob("*.c") if path.stem not in {"ioctl", "real"}),  # KVM is the program's own
    ]
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-pthread"]
    made = subprocess.run(["gcc", *flags, *FLAGS[sanitizer], *sources, "-o", program], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    ran = subprocess.run(
        [program, tmp_path / "daemon.sock"],
        env=os.environ | OPTIONS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert ran.returncode == 0, ran.stdout
