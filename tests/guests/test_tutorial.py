"""docs/your-own-device.md: its device passes its own tests, and a real Linux guest throws its dice."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from guests.testbed import Testbed
from kit.project import ROOT

from guest.boot.machine import Machine
from guest.boot.service import free_port, serve

pytestmark = pytest.mark.guest

TUTORIAL = ROOT / "docs" / "your-own-device.md"
HYPERBELL = Path(sys.executable).parent / "hyperbell"


def block_with(text: str, language: str) -> str:
    """The code block of the tutorial that has ``text``."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if text in block]
    return str(found)


def qemu_args(folder: Path) -> list[str]:
    """What ``hyperbell qemu-args`` prints, word by word, the ends of lines included."""
    command = [str(HYPERBELL), "qemu-args", "dice.toml", "--memory", "256M"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def written(folder: Path) -> Path:
    """What somebody has who followed it."""
    (folder / "dice.py").write_text(block_with("class Dice(Device)", "python"))
    (folder / "test_dice.py").write_text(block_with("from dice import", "python"))
    (folder / "dice.toml").write_text(block_with("[devices.dice]", "toml"))
    return folder


def test_device_of_the_tutorial_passes_the_tests_of_the_tutorial(written: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_dice.py"]
    ran = subprocess.run(command, cwd=written, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 passed" in ran.stdout


def test_qemu_is_told_what_the_tutorial_shows(written: Path) -> None:
    shown = block_with("vhost-user-rng-pci", "sh").replace("/home/you", str(written.resolve()))
    assert qemu_args(written) == shown.split()


async def test_a_linux_guest_throws_the_dice(testbed: Testbed, written: Path) -> None:
    file = written / "dice.toml"
    port = free_port()
    file.write_text(file.read_text().replace("[daemon]", f'[daemon]\nmetrics = "127.0.0.1:{port}"', 1))
    devices = [word for word in qemu_args(written) if word != "\\"]
    async with (
        serve(file, written, port) as daemon,
        testbed.hypervisor.boot(Machine(testbed.kernel.image, testbed.initramfs, devices)) as guest,
    ):
        answer = await guest.run(block_with("/dev/hwrng", "sh"))
        throws = [int(word) for word in " ".join(answer.lines).split()]
        assert len(throws) == 16
        assert set(throws) <= set(range(1, 7))
        assert len(set(throws)) > 1
        metrics = await daemon.metrics()
        assert metrics.total("hyperbell_requests_total", device="dice", op="throw") >= 1
        await guest.power_off()
        await daemon.stop()
