"""A daemon one of whose images hangs: everything else is served, a reload returns, and SIGTERM ends it."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from kit.front_end.frontend import Guest
from kit.front_end.links import SocketLink
from kit.front_end.scene import DaemonProcess, LogBook
from kit.guest.blk import T_IN, BlkDriver, VerifiedLoad, header
from kit.host.failing_storage import FailingImage, failing_image

from daemon.running.control import ask
from virtio.testing.queue import GUARD

CONFIGURATION = """
[daemon]
metrics = "off"
control = "control.sock"
stop_seconds = {stop}

[devices.hangs]
type = "blk"
path = "{image}"
socket = "hangs.sock"

[devices.fine]
type = "blk"
backend = "memory"
size = "1MiB"
socket = "fine.sock"
"""


class Scene:
    def __init__(self, folder: Path, image: FailingImage, stop: int) -> None:
        self.folder = folder
        self.image = image
        self.log = LogBook()
        file = folder / "hyperbell.toml"
        file.write_text(CONFIGURATION.format(image=image.path, stop=stop))
        self.daemon = DaemonProcess(file, self.log)
        self.log.wait_for(0, "serving")

    async def disk(self, name: str) -> Guest:
        guest = Guest(await SocketLink.connect(self.folder / f"{name}.sock"))
        await guest.start()
        return guest


@asynccontextmanager
async def scene(folder: Path, stop: int = 60) -> AsyncIterator[Scene]:
    async with failing_image(1 << 20) as image:
        it = await trio.to_thread.run_sync(Scene, folder, image, stop)
        try:
            yield it
        finally:
            await image.hang()
            if it.daemon.alive():
                await trio.to_thread.run_sync(it.daemon.stop)


async def test_a_reload_while_an_image_hangs_stops_neither_the_other_disks_nor_the_control_socket(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as s:
        guest = await s.disk("fine")
        await s.image.hang("getattr")
        mark = s.log.mark
        s.daemon.signal(signal.SIGHUP)
        await s.image.hung("getattr")
        devices = await trio.to_thread.run_sync(ask, tmp_path / "control.sock", "list")
        assert [device["name"] for device in devices["devices"]] == ["hangs", "fine"]
        load = VerifiedLoad(guest.queues[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await load.progress()
            nursery.cancel_scope.cancel()
        assert not s.log.since(mark, "reloaded")
        await s.image.hang()
        await s.log.expect(mark, "reloaded")
        guest.close()


async def test_a_reload_while_an_image_hangs_ends_and_says_which(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        await s.image.hang("getattr")
        mark = s.log.mark
        s.daemon.signal(signal.SIGHUP)
        await s.log.expect(mark, "reloaded")
        (entry,) = s.log.since(mark, "not examined: its storage has not answered")
        assert entry["device"] == "hangs"


async def test_sigterm_ends_the_daemon_though_a_disk_hangs_and_it_says_which(tmp_path: Path) -> None:
    async with scene(tmp_path, stop=1) as s:
        guest = await s.disk("hangs")
        disk = BlkDriver(guest.queues[0])
        await s.image.hang("read")
        for _ in range(3):
            disk.submit([header(T_IN)], [4096, 1])
        disk.queue.kick()
        await s.image.hung("read")
        mark = s.log.mark
        s.daemon.signal(signal.SIGTERM)
        with trio.fail_after(GUARD):
            assert await trio.to_thread.run_sync(s.daemon.wait) == 1
        (entry,) = s.log.since(mark, "the daemon ends without waiting any longer")
        (waiting,) = entry["waiting"]
        assert waiting.startswith("hangs queue 0: 3 in flight")
        guest.close()


async def test_sigterm_ends_the_daemon_though_a_file_is_not_closed_and_it_says_which(tmp_path: Path) -> None:
    """No request is in flight."""
    async with scene(tmp_path, stop=1) as s:
        await s.image.hang("flush")
        s.daemon.signal(signal.SIGTERM)
        entry = await s.log.expect(0, "the daemon ends without waiting any longer: storage has not answered")
        await s.image.hang()
        assert await trio.to_thread.run_sync(s.daemon.wait) == 1
        (waiting,) = entry["waiting"]
        assert waiting.startswith(f"hangs: {s.image.path} has not answered for ")


async def test_an_image_that_became_smaller_is_reported_with_both_sizes(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        await s.image.resize(1 << 19)
        mark = s.log.mark
        s.daemon.signal(signal.SIGHUP)
        entry = await s.log.expect(mark, "the image is smaller than before")
        assert (entry["device"], entry["bytes_before"], entry["bytes_now"]) == ("hangs", 1 << 20, 1 << 19)
