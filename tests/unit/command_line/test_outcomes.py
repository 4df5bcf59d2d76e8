"""How commands end when the operator interrupts them, or when nobody can take what they print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kit.project import ROOT

from daemon import cli
from daemon.commands import doorbells

DISK = '[devices.disk]\ntype = "blk"\nbackend = "null"\nsize = "1M"\nsocket = "disk.sock"\n'

INTERRUPTED = """
import signal, sys, trio
from daemon import cli
from daemon.commands import doorbells

async def work():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        async with trio.open_nursery() as inner:
            inner.start_soon(trio.sleep_forever)
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
doorbells.run_doorbells = lambda **options: trio.run(work)
sys.exit(cli.main(["doorbells"]))
"""


def test_an_interrupted_measurement_ends_quietly_with_130() -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (128 + signal.SIGINT, "", "")


def test_an_interruption_does_not_hide_what_else_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> bool:
        raise BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError("unforeseen")])

    monkeypatch.setattr(doorbells, "run_doorbells", fail)
    with pytest.raises(BaseExceptionGroup, match="both"):
        cli.main(["doorbells"])


@pytest.mark.parametrize("command", [["schema"], ["check", "c.toml"]])
def test_a_full_device_for_the_output_is_one_line(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "c.toml").write_text(DISK)
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "daemon.cli", *command],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    said = "hyperbell: the output cannot be written: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, said)


def test_what_is_wrong_with_a_file_is_not_taken_for_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> bool:
        raise OSError(28, "No space left on device", "/var/lib/x")

    monkeypatch.setattr(doorbells, "run_doorbells", fail)
    with pytest.raises(OSError, match="/var/lib/x"):
        cli.main(["doorbells"])
