"""A run of tests says how many guests booted: those whose userspace was reached, in whichever process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit.project import ROOT

from guest.boot.console import BOOTED, Console, MachineError

INNER = """
import trio
from guest.boot.console import Console

class Guest(Console):
    def __init__(self, kind):
        super().__init__(lambda line: None)
        self.kind = kind
        self.said = [b"GUEST userspace 1.0\\n"]
    async def _receive(self): return self.said.pop() if self.said else b""
    async def _transmit(self, data): pass
    async def _why_ended(self): return "ended"

def boot(kind):
    async def main(): await Guest(kind).expect_userspace(1)
    trio.run(main)

def test_one(): boot("QEMU")
def test_other(): boot("QEMU")
def test_nested(): boot("nested")
"""
NO_GUEST = "def test_one(): pass\n"


class Mute(Console):
    """A machine whose firmware speaks and that then ends."""

    def __init__(self) -> None:
        super().__init__(lambda line: None)
        self._said = [b"SeaBIOS\nGUEST user\n"]

    async def _receive(self) -> bytes:
        return self._said.pop() if self._said else b""

    async def _transmit(self, data: bytes) -> None:
        raise AssertionError("nobody is there")

    async def _why_ended(self) -> str:
        return "it ended"


async def test_a_guest_that_does_not_reach_userspace_is_not_counted() -> None:
    before = BOOTED.total()
    with pytest.raises(MachineError, match="it ended while we waited for its userspace"):
        await Mute().expect_userspace(5)
    assert BOOTED.total() == before


@pytest.mark.parametrize("processes", [[], ["-n2", "--dist=load"]], ids=["alone", "two processes"])
@pytest.mark.parametrize(
    ("tests", "line"), [(INNER, "guests booted: 3 (QEMU 2, nested 1)"), (NO_GUEST, "guests booted: 0")]
)
def test_a_runs_last_lines_say_how_many_guests_booted(
    tmp_path: Path, processes: list[str], tests: str, line: str
) -> None:
    (tmp_path / "test_inner.py").write_text(tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "kit.guest.count", *processes, str(tmp_path)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 0, said.stdout
    assert line == said.stdout.splitlines()[-2]
