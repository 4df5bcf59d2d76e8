"""A daemon that opens or closes a file that hangs: everything else is served, and the log says which it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import Guest
from kit.front_end.links import SocketLink
from kit.front_end.scene import DaemonProcess, LogBook
from kit.guest.blk import VerifiedLoad
from kit.host.failing_storage import failing_image

from daemon.running.control import ask

CONFIGURATION = """
[daemon]
metrics = "off"
control = "control.sock"

[devices.hangs]
type = "blk"
path = "{image}"
socket = "{folder}/hangs.sock"

[devices.fine]
type = "blk"
backend = "memory"
size = "1MiB"
socket = "fine.sock"
"""


async def check_the_other_disk_is_served(folder: Path) -> None:
    """Its guest is answered, and the control socket too."""
    shown = await trio.to_thread.run_sync(ask, folder / "control.sock", "list")
    assert "fine" in [device["name"] for device in shown["devices"]]
    guest = Guest(await SocketLink.connect(folder / "fine.sock"))
    await guest.start()
    load = VerifiedLoad(guest.queues[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await load.progress()
        nursery.cancel_scope.cancel()
    guest.close()


CHIP = 'type = "i2c"\nchips = [{ kind = "eeprom", address = 0x50, size = 65536, page = 256, path = "PATH" }]\n'


@pytest.mark.parametrize("kind", ["blk", "i2c"])
async def test_a_file_that_hangs_when_it_is_opened_is_named_and_served_once_its_file_system_answers(
    tmp_path: Path, kind: str
) -> None:
    async with failing_image(65536) as image:
        file, log = tmp_path / "c.toml", LogBook()
        text = CONFIGURATION.format(image=image.path, folder=".")
        if kind == "i2c":
            chip = CHIP.replace("PATH", str(image.path))
            text = re.sub(r'type = "blk"\npath = .*\n', lambda _: chip, text, count=1)
        file.write_text(text)
        await image.hang("open")
        daemon = await trio.to_thread.run_sync(DaemonProcess, file, log)
        try:
            await image.hung("open")
            await log.expect(0, "serving")
            await check_the_other_disk_is_served(tmp_path)
            failed = await log.expect(0, "device failed")
            assert failed["device"] == "hangs"
            assert f"{image.path}: the file system has not answered" in failed["reason"]
            mark = log.mark
            await image.hang()
            await log.expect(mark, "device is served again")  # the late device has given its lock back
        finally:
            await image.hang()
            await trio.to_thread.run_sync(daemon.stop)


async def test_a_failed_devices_image_that_hangs_when_it_is_closed_delays_no_other_device(tmp_path: Path) -> None:
    async with failing_image(1 << 20) as image:
        file, log = tmp_path / "c.toml", LogBook()
        file.write_text(CONFIGURATION.format(image=image.path, folder="later"))
        await image.hang("flush")
        daemon = await trio.to_thread.run_sync(DaemonProcess, file, log)
        try:
            await image.hung("flush")
            await check_the_other_disk_is_served(tmp_path)
            entry = await log.expect(0, "not closed yet: its storage has not answered")
            assert (entry["device"], entry["path"]) == ("hangs", str(image.path))
            await check_the_other_disk_is_served(tmp_path)
            (tmp_path / "later").mkdir()
            mark = log.mark
            await image.hang()
            await log.expect(mark, "device is served again")
        finally:
            await image.hang()
            await trio.to_thread.run_sync(daemon.stop)
