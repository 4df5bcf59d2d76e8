"""The daemon as a process: what it serves, how it stops, and what it leaves behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import Guest, every_ring
from kit.front_end.links import SocketLink
from kit.front_end.scene import DaemonProcess, LogBook
from kit.guest.blk import S_OK, T_OUT, BlkDriver, VerifiedLoad, contents, header, pattern

from virtio.testing.queue import GUARD

MIB = 1 << 20
CONFIGURATION = """
[daemon]
metrics = "off"

[workers.first]
[workers.second]

[devices.disk]
type = "blk"
path = "disk.img"
socket = "disk.sock"
queues = 2
workers = ["first", "second"]
packed = true

[devices.entropy]
type = "rng"
socket = "entropy.sock"
packed = true

[devices.terminal]
type = "console"
backend = "socket"
path = "terminal"
socket = "terminal.sock"
packed = true
"""


class Installation:
    """A folder with a configuration and an image, and the daemons that were started on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "disk.img"
        self.file = folder / "hyperbell.toml"
        self.file.write_text(CONFIGURATION)
        self.image.write_bytes(bytes(4 * MIB))
        self.log = LogBook()
        self.daemons: list[DaemonProcess] = []

    def start(self) -> DaemonProcess:
        mark = self.log.mark
        self.daemons.append(DaemonProcess(self.file, self.log))
        self.log.wait_for(mark, "serving")
        return self.daemons[-1]

    async def connect(self, device: str, ring: str = "split") -> Guest:
        guest = Guest(await SocketLink.connect(self.folder / f"{device}.sock"), ring)
        await guest.start()
        return guest

    def sockets(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_socket())


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    place = Installation(tmp_path)
    yield place
    for daemon in place.daemons:
        if daemon.alive():
            daemon.stop()


@every_ring
async def test_one_daemon_serves_a_disk_an_entropy_source_and_a_console(installation: Installation, ring: str) -> None:
    daemon = installation.start()
    disk = await installation.connect("disk", ring)
    entropy = await installation.connect("entropy", ring)
    terminal = await installation.connect("terminal", ring)
    for queue in disk.queues:
        await BlkDriver(queue).write(8 * queue.index, pattern(4096, queue.index))
        assert await BlkDriver(queue).read(8 * queue.index, 4096) == pattern(4096, queue.index)
    assert (await entropy.queues[0].request([], [100])).written == 100
    with trio.fail_after(GUARD):
        async with await trio.open_unix_socket(installation.folder / "terminal") as reader:
            await terminal.queues[1].request([b"login: "], [])
            assert await reader.receive_some() == b"login: "
            await reader.send_all(b"root\n")
            used = await terminal.queues[0].request([], [64])
            assert used.buffers[0][: used.written] == b"root\n"
    for guest in (disk, entropy, terminal):
        guest.close()
    assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_stop_with_requests_under_way_loses_none_that_were_answered(
    installation: Installation, number: signal.Signals
) -> None:
    daemon = installation.start()
    guest = await installation.connect("disk")
    try:
        driver = BlkDriver(guest.queues[0])
        tokens = [driver.submit([header(T_OUT, 8 * n), pattern(4096, n)], [1]) for n in range(20)]
        driver.queue.kick()
        assert (await driver.answer(tokens[0])).status == S_OK
        daemon.signal(number)
        assert await trio.to_thread.run_sync(daemon.wait) == 0
        answered = {0} | {tokens.index(used.token) for used in driver.queue.driver.used()}
        for n in answered:
            assert contents(installation.image)[4096 * n :][:4096] == pattern(4096, n)
    finally:
        guest.close()
    assert installation.sockets() == []
    events = [entry["event"] for entry in installation.log.since(0)]
    assert events[-1] == "stopped"
    assert not [entry for entry in installation.log.since(0) if entry["level"] in ("warning", "error")]


async def test_a_disk_is_the_same_after_a_restart(installation: Installation) -> None:
    for n in range(3):
        daemon = installation.start()
        guest = await installation.connect("disk", "packed" if n % 2 else "split")
        disk = BlkDriver(guest.queues[n % 2])
        for earlier in range(n):
            assert await disk.read(100 * earlier, 4096) == pattern(4096, earlier)
        await disk.write(100 * n, pattern(4096, n))
        guest.close()
        assert daemon.stop() == 0


async def test_a_daemon_that_is_killed_leaves_nothing_in_the_way_of_the_next(installation: Installation) -> None:
    daemon = installation.start()
    guest = await installation.connect("disk")
    await BlkDriver(guest.queues[0]).write(0, pattern(4096, 1))
    daemon.signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    guest.close()
    assert installation.sockets() != []
    again = installation.start()
    guest = await installation.connect("disk")
    assert await BlkDriver(guest.queues[0]).read(0, 4096) == pattern(4096, 1)
    guest.close()
    assert again.stop() == 0


async def test_a_second_daemon_on_the_same_image_waits_until_the_first_one_ends(installation: Installation) -> None:
    daemon = installation.start()
    guest = await installation.connect("disk")
    load = VerifiedLoad(guest.queues[0])
    other = installation.folder / "other.toml"
    text = CONFIGURATION.split("[devices.entropy]")[0].replace("disk.sock", "other.sock")
    await trio.Path(other).write_text(text)
    log = LogBook()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        second = DaemonProcess(other, log)
        await trio.to_thread.run_sync(log.wait_for, 0, "serving")
        (entry,) = log.since(0, "device failed")
        assert entry["device"] == "disk"
        assert "the image is being used by another device or daemon" in entry["reason"]
        await load.progress()
        assert "other.sock" not in installation.sockets()
        nursery.cancel_scope.cancel()
    guest.close()
    assert daemon.stop() == 0
    await trio.to_thread.run_sync(log.wait_for, 0, "device is served again")
    assert "other.sock" in installation.sockets()
    assert second.stop() == 0


async def test_a_reload_tells_the_guest_of_an_image_that_has_grown(installation: Installation) -> None:
    daemon = installation.start()
    guest = await installation.connect("disk")
    try:
        assert isinstance(guest.link, SocketLink)
        await guest.link.open_channel()
        load = VerifiedLoad(guest.queues[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            os.truncate(installation.image, 8 * MIB)
            daemon.signal(signal.SIGHUP)
            with trio.fail_after(GUARD):
                await guest.link.config_change()
            await load.progress()
            nursery.cancel_scope.cancel()
        assert int.from_bytes(await guest.link.read_config(0, 8), "little") == 8 * MIB // 512
        await BlkDriver(guest.queues[0]).write(8 * MIB // 512 - 8, pattern(4096, 3))
    finally:
        guest.close()
    assert daemon.stop() == 0
