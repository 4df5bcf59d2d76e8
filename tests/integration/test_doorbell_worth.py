"""A running daemon that knows what doorbells cost: rates and shares of a CPU, live; and one whose file is bad."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from kit.doorbell_reports import measurement
from kit.front_end.frontend import Guest
from kit.front_end.links import SocketLink
from kit.front_end.scene import DaemonProcess, LogBook
from kit.guest.blk import BlkDriver, pattern

from daemon.doorbells.measure import report_of
from daemon.doorbells.report import save
from daemon.running.control import ask
from guest.boot.toy import prepare_toy

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


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that this user may open")
async def test_a_machine_of_our_own_counts_each_kind_and_shows_what_it_could_save(tmp_path: Path) -> None:
    save(report_of(measurement(), below=""), tmp_path / "costs.json")
    toy = await trio.to_thread.run_sync(lambda: prepare_toy(lambda text: None).program(64))
    words = ["--memory", "4M", "--kernel", str(toy), "--device", "rng,name=entropy"]
    words += ["--append", "device=4:0xd0001000:17:0x1002 doorbell=pio mode=loop requests=100000000"]
    words += ["--control", str(tmp_path / "control.sock"), "--doorbell-costs", str(tmp_path / "costs.json")]
    words += ["--metrics", "127.0.0.1:0", "--log-level", "info"]
    command = [sys.executable, "-m", "daemon.cli", "microvm", *words]
    with trio.fail_after(PATIENCE):
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            async for said in process.stderr:
                if b"/metrics" in said:  # the control socket listens by then
                    break
            device = await ringing(tmp_path, "entropy")
        finally:
            process.terminate()
            await process.wait()
    assert device["rates"]["plain"]["mmio"] == 0
    assert device["worth"]["possible"] == pytest.approx(device["rates"]["plain"]["pio"] * 200e-9)


async def ringing(folder: Path, name: str) -> Any:
    """What is said of the device once it is rung."""
    while True:
        for device in (await stats(folder))["doorbells"]["devices"]:
            if device["device"] == name and sum(device["rates"]["plain"].values()) > 0:
                return device


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
