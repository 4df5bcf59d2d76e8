"""In-band notifications over a real socket: the front-end kicks by messages and is interrupted by messages."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
from kit.front_end.frontend import NATIVE_SETTINGS, PACKED_START, Plugged, Setting, plugged
from kit.front_end.links import SocketLink
from kit.guest.blk import BlkDriver, make_disk, pattern
from kit.ring.driven import DRIVEN, check_it_works, make_device

from virtio.devices.blk.device import Blk
from virtio.testing.driver import Element
from virtio.testing.queue import GUARD, GuestQueue

VRING_KICK = 35
CONFIG_CHANGE, VRING_CALL, VRING_ERR = 2, 4, 5
ON_SOCKETS = [setting for setting in NATIVE_SETTINGS if setting.way == "socket"]


class Messenger:
    """Between a queue's eventfds, which the driver knows, and the messages, which the back-end knows."""

    def __init__(self, link: SocketLink, queue: GuestQueue) -> None:
        self._link = link
        self._queue = queue
        self.kicks = 0
        self.calls = 0
        self.errors = 0
        self._kicking = trio.Lock()

    async def carry_kicks(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._queue.kick_fd)
            async with self._kicking:
                if self._was_kicked():
                    assert await self._link.front_end.do(VRING_KICK, wire.vring_state(0, 0)) == 0
                    self.kicks += 1

    def _was_kicked(self) -> bool:
        try:
            os.eventfd_read(self._queue.kick_fd)
        except BlockingIOError:
            return False
        return True

    async def stop(self) -> int:
        """Stop the ring, which is empty, between two kicks; its base. What it was kicked for may have been served
        before the kick was carried: such a kick is dropped, for it would start the ring again."""
        async with self._kicking:
            self._was_kicked()
            return await self._link.stop(0)

    async def carry_calls(self) -> None:
        channel = await self._link.open_channel()
        while True:
            number, payload = await channel.receive()
            assert number in (VRING_CALL, VRING_ERR)
            assert payload == wire.vring_state(0, 0)
            await channel.send(wire.reply_to(number, wire.u64(0)))
            if number == VRING_CALL:
                self.calls += 1
                os.eventfd_write(self._queue.call_fd, 1)
            else:
                self.errors += 1
                os.eventfd_write(self._queue.err_fd, 1)


async def start(p: Plugged) -> SocketLink:
    """As User-mode Linux: no SET_VRING_KICK, SET_VRING_CALL or SET_VRING_ERR at all. The first kick starts the ring."""
    guest, link = p.guest, p.guest.link
    assert isinstance(link, SocketLink)
    await guest.negotiate()
    await link.open_channel()
    await link.share(guest.memory)
    queue = guest.add_queue(64)
    await link.set_up(0, 64, queue.areas, PACKED_START if guest.ring == "packed" else 0)
    await link.enable(0, True)
    return link


@asynccontextmanager
async def by_messages(p: Plugged) -> AsyncIterator[Messenger]:
    link = await start(p)
    messenger = Messenger(link, p.guest.queues[0])
    with trio.fail_after(GUARD):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(messenger.carry_kicks)
            nursery.start_soon(messenger.carry_calls)
            yield messenger
            nursery.cancel_scope.cancel()


def disk(tmp_path: Path) -> Blk:
    return make_disk("file", tmp_path / "image")


@pytest.mark.parametrize("setting", ON_SOCKETS, ids=str)
async def test_a_disk_is_kicked_and_called_by_messages(setting: Setting, tmp_path: Path) -> None:
    async with (
        plugged(disk(tmp_path), setting, start=False, inband_notifications=True) as p,
        by_messages(p) as messenger,
    ):
        driver = BlkDriver(p.guest.queues[0])
        for n in range(10):
            await driver.write(8 * n, pattern(4096, n))
            assert await driver.read(8 * n, 4096) == pattern(4096, n)
        assert messenger.kicks >= 10
        assert messenger.calls >= 10
        assert messenger.errors == 0


@pytest.mark.parametrize("driven", DRIVEN)
async def test_a_ring_that_was_stopped_starts_again_with_the_next_kick(driven: str) -> None:
    setting = Setting("socket", "split", "" if driven == "pump" else driven)
    async with (
        plugged(make_device(driven), setting, start=False, inband_notifications=True) as p,
        by_messages(p) as messenger,
    ):
        queue, link = p.guest.queues[0], p.guest.link
        await check_it_works(queue)
        descriptors = len(wire.open_fds())
        for _ in range(3):
            base = await messenger.stop()
            assert not p.backend.stats().queues[0].running
            await link.set_up(0, 64, queue.areas, base)
            await check_it_works(queue)
            assert len(wire.open_fds()) == descriptors


async def test_a_ring_that_breaks_is_told_by_a_message(tmp_path: Path) -> None:
    async with (
        plugged(disk(tmp_path), ON_SOCKETS[0], start=False, inband_notifications=True) as p,
        by_messages(p) as messenger,
    ):
        queue = p.guest.queues[0]
        queue.driver.add_elements([Element(0, 16, False)])
        queue.ring()
        await trio.lowlevel.wait_readable(queue.err_fd)
        assert messenger.errors >= 1


async def test_a_front_end_that_brings_descriptors_is_served_by_them(tmp_path: Path) -> None:
    """It may mix: what it marks as invalid goes by messages, and nothing else does."""
    async with plugged(disk(tmp_path), ON_SOCKETS[0], inband_notifications=True) as p:
        link, queue = p.guest.link, p.guest.queues[0]
        assert isinstance(link, SocketLink)
        channel = await link.open_channel()
        driver = BlkDriver(queue)
        await driver.write(0, pattern(512, 1))
        assert await driver.read(0, 512) == pattern(512, 1)
        with pytest.raises(BlockingIOError):
            os.read(channel.socket.fileno(), 1)
        await link.set_call(0, None)
        with trio.fail_after(GUARD):
            assert await channel.receive() == (VRING_CALL, wire.vring_state(0, 0))
        await channel.send(wire.reply_to(VRING_CALL, wire.u64(0)))
        await link.set_call(0, queue.call_fd)
        assert await driver.read(0, 512) == pattern(512, 1)


@pytest.mark.parametrize("missing", [wire.BACKEND_REQ, wire.REPLY_ACK], ids=["BACKEND_REQ", "REPLY_ACK"])
async def test_without_a_way_to_be_called_the_connection_ends(missing: int, tmp_path: Path) -> None:
    async with plugged(disk(tmp_path), ON_SOCKETS[0], start=False, inband_notifications=True) as p:
        assert isinstance(p.guest.link, SocketLink)
        front_end = p.guest.link.front_end
        bits = (wire.ALL_PROTOCOL_FEATURES | wire.INBAND_NOTIFICATIONS) & ~missing
        await front_end.send(wire.message(16, wire.u64(bits)))
        assert await front_end.ended()


async def test_a_front_end_that_does_not_read_its_calls_holds_up_nobody(tmp_path: Path) -> None:
    """Requests are served while the channel is silent, and one call waits, not one for each of them."""
    async with plugged(disk(tmp_path), ON_SOCKETS[0], start=False, inband_notifications=True) as p:
        link = await start(p)
        queue = p.guest.queues[0]
        with trio.fail_after(GUARD):
            for _ in range(50):
                queue.driver.want_interrupts(True)
                queue.driver.add([b"\x08" + bytes(15)], [21])
                assert await link.front_end.do(VRING_KICK, wire.vring_state(0, 0)) == 0
                while not queue.driver.used():
                    await trio.lowlevel.checkpoint()
        channel = await link.open_channel()
        assert await channel.receive() == (VRING_CALL, wire.vring_state(0, 0))
        with pytest.raises(BlockingIOError):
            os.read(channel.socket.fileno(), 1)
