"""A running daemon that knows what doorbells cost: rates and shares of a CPU, live; and one whose file is bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from blk_driver import BlkDriver, pattern
from doorbell_reports import measurement
from frontend import Guest
from links import SocketLink
from scene import DaemonProcess, LogBook

from daemon.control import ask
from daemon.doorbell_report import save
from daemon.doorbells import report_of

CONFIGURATION = """
[daemon]
metrics = "off"
control = "control.sock"
doorbell_costs = "costs.json"

[devices.disk]
type = "blk"
backend = "memory"
size = "1M"
socket = "disk.sock"
"""
PATIENCE = 60


async def stats(folder: Path) -> dict[str, Any]:
    return await trio.to_thread.run_sync(ask, folder / "control.sock", "stats")


async def write_once(guest: Guest) -> None:
    await BlkDriver(guest.queues[0]).write(0, pattern(4096, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hyperbell.toml").write_text(CONFIGURATION)
    return tmp_path


async def test_a_daemon_that_knows_the_costs_shows_what_a_device_could_save(folder: Path) -> None:
    save(report_of(measurement(), below=""), folder / "costs.json")
    log = LogBook()
    daemon = DaemonProcess(folder / "hyperbell.toml", log)
    try:
        log.wait_for(0, "serving")
        guest = Guest(await SocketLink.connect(folder / "disk.sock"), "split")
        await guest.start()
        with trio.fail_after(PATIENCE):
            while True:  # each turn is a request of the driver's, and so a ring
                await write_once(guest)
                doorbells = (await stats(folder))["doorbells"]
                if doorbells["devices"] and doorbells["devices"][0]["rates"]["plain"]["mmio"] > 0:
                    break
        (device,) = doorbells["devices"]
        assert doorbells["trustworthy"] is True
        assert doorbells["window_seconds"] >= 5
        assert device["rates"]["hypercall"] == 0
        assert device["worth"]["saved"] == 0
        assert device["worth"]["possible"] == pytest.approx(device["rates"]["plain"]["mmio"] * 100e-9)
        guest.close()
    finally:
        status = daemon.stop()
    assert status == 0


async def test_a_bad_file_of_costs_is_one_warning_and_the_devices_are_served(folder: Path) -> None:
    (folder / "costs.json").write_text("{}")
    log = LogBook()
    daemon = DaemonProcess(folder / "hyperbell.toml", log)
    try:
        log.wait_for(0, "[daemon] doorbell_costs cannot be used")
        log.wait_for(0, "serving")
        guest = Guest(await SocketLink.connect(folder / "disk.sock"), "split")
        await guest.start()
        await write_once(guest)
        assert (await stats(folder))["doorbells"] is None
        guest.close()
    finally:
        status = daemon.stop()
    assert status == 0
