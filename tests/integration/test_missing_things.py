"""A device that lacks what it is made of is failed, with its reason; the other devices of the daemon are served."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest
from kit.front_end.scene import DaemonProcess, LogBook
from kit.net.own_network import own_network

from daemon.running.control import ask

CONFIGURATION: Final = """
[daemon]
metrics = "off"
control = "control.sock"

[devices.entropy]
type = "rng"
socket = "entropy.sock"

[devices.lacking]
type = "{kind}"
socket = "lacking.sock"
{keys}
"""
LACKING: Final = {
    "an image": ("blk", 'path = "none.img"', "none.img"),
    "a folder of sockets": ("console", 'backend = "socket"\npath = "none/console"', "none/console"),
    "a bridge": ("net", 'backend = "tap"\nbridge = "hb-none"', "hb-none"),
    "a peer's folder": ("net", 'backend = "socket"\nlocal = "unix:FOLDER/none/peer"', "none/peer"),
    "a GPIO chip": ("gpio", 'backend = "chip"\nchip = "/dev/gpiochip77"\nlines = [1]', "/dev/gpiochip77"),
    "an I2C adapter": ("i2c", 'backend = "adapter"\nadapter = "/dev/i2c-77"\naddresses = [0x50]', "/dev/i2c-77"),
    "an input device": ("input", 'backend = "evdev"\nevdev = "/dev/input/event77"', "/dev/input/event77"),
    "a folder of guests": ("vsock", 'cid = 3\npath = "none/vsock"', "none/vsock"),
}


@pytest.mark.parametrize(("kind", "keys", "named"), LACKING.values(), ids=LACKING)
def test_a_device_that_lacks_something_is_failed_with_its_reason_and_others_are_served(
    tmp_path: Path, kind: str, keys: str, named: str
) -> None:
    file, log = tmp_path / "c.toml", LogBook()
    file.write_text(CONFIGURATION.format(kind=kind, keys=keys.replace("FOLDER", str(tmp_path))))
    with own_network():
        daemon = DaemonProcess(file, log)
        try:
            log.wait_for(0, "serving")
            state = ask(tmp_path / "control.sock", "stats")
            assert [device["backend"]["device"] for device in state["devices"]] == ["entropy"]
            (failed,) = state["failed"]
            assert failed["device"] == "lacking"
            assert named in failed["reason"]
            assert failed["next_attempt"] is not None
            (told,) = log.since(0, "device failed")
            assert (told["device"], told["level"]) == ("lacking", "error")
            assert named in told["reason"]
        finally:
            assert daemon.stop() == 0


def test_a_tap_that_is_there_again_is_served_again(tmp_path: Path) -> None:
    """It is somebody else's until then."""
    file, log = tmp_path / "c.toml", LogBook()
    keys = 'backend = "tap"\ntap = "hb-taken"'
    file.write_text(CONFIGURATION.format(kind="net", keys=keys))
    with own_network():
        subprocess.run(["ip", "link", "add", "hb-taken", "type", "veth", "peer", "name", "hb-other"], check=True)
        daemon = DaemonProcess(file, log)
        try:
            log.wait_for(0, "serving")
            assert "hb-taken" in log.since(0, "device failed")[0]["reason"]
            mark = log.mark
            subprocess.run(["ip", "link", "delete", "hb-taken"], check=True)
            log.wait_for(mark, "device is served again")
        finally:
            assert daemon.stop() == 0
