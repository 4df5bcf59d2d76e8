"""The fuzz targets without a fuzzer: the kept seeds, and inputs made from them, the same ones every time.

``make -C tests/fuzz fuzz TARGET=... SECONDS=...`` searches further, with clang's libFuzzer; what it finds is kept.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / ".cache" / "fuzz"
TARGETS = sorted(path.stem for path in HERE.glob("fuzz_*.c") if path.stem != "fuzz_main")
ROUNDS = 60_000


@pytest.fixture(scope="session")
def built() -> Path:
    made = subprocess.run(["make", "-C", HERE, f"BUILD={BUILD}", "-j2", "all"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return BUILD


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_breaks_the_invariant(built: Path, target: str) -> None:
    """Which one that is stands in the first lines of the target."""
    ran = subprocess.run(
        [built / target, str(ROUNDS), HERE / "seeds" / target],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout
