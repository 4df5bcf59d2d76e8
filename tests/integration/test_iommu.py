"""A guest behind an IOMMU over a real socket: misses come over the back-end channel, answers over the other one."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
from kit.front_end.frontend import F_RING_PACKED, NATIVE_SETTINGS, PACKED_START, Guest, Setting, plugged
from kit.front_end.links import F_ACCESS_PLATFORM, SocketLink
from kit.guest.blk import BlkDriver, make_disk, pattern

from virtio.testing.queue import GUARD

PAGE = 4096
IOTLB_MSG, BACKEND_IOTLB_MSG = 22, 1
MISS, UPDATE, INVALIDATE = 1, 2, 3
READ_WRITE = 3


async def start(guest: Guest, link: SocketLink) -> None:
    features = await link.device_features()
    assert features & F_ACCESS_PLATFORM
    guest.features = features if guest.ring == "packed" else features & ~F_RING_PACKED
    await link.negotiate(guest.features)
    await link.open_channel()
    memory = guest.memory
    # Its guest physical addresses are none of the driver's business: the driver only knows I/O virtual ones.
    table = wire.mem_table(wire.region(0x1000, memory.size, memory.uva))
    assert await link.front_end.do(5, table, [os.dup(memory.fd)]) == 0
    queue = guest.add_queue(64)
    driver = queue.driver
    base = PACKED_START if guest.ring == "packed" else 0
    await link.set_up(0, 64, (driver.desc, driver.avail, driver.used_area), base)
    await link.set_call(0, queue.call_fd)
    await link.enable(0, True)
    await link.set_kick(0, queue.kick_fd)


class Iommu:
    """Answers what the back-end asks for, a page at a time."""

    def __init__(self, guest: Guest, link: SocketLink) -> None:
        self._guest = guest
        self._link = link
        self.asked: list[int] = []
        self._turn = trio.Lock()

    async def tell(self, kind: int, iova: int, size: int) -> None:
        """Add or remove a translation."""
        uva, perm = (self._guest.memory.to_uva(iova), READ_WRITE) if kind == UPDATE else (0, 0)
        async with self._turn:
            answer = await self._link.front_end.ask(IOTLB_MSG, wire.iotlb(kind, iova, size, uva, perm))
        assert answer == wire.u64(0)

    async def run(self) -> None:
        channel = await self._link.open_channel()
        while True:
            number, payload = await channel.receive()
            assert number == BACKEND_IOTLB_MSG
            iova, _, _, _, kind = struct.unpack("=QQQBB6x", payload)
            assert kind == MISS
            self.asked.append(iova)
            await self.tell(UPDATE, iova & -PAGE, PAGE)
            await channel.send(wire.reply_to(BACKEND_IOTLB_MSG, wire.u64(0)))


@pytest.mark.parametrize("setting", [s for s in NATIVE_SETTINGS if s.way == "socket"], ids=str)
async def test_a_disk_behind_an_iommu_asks_for_every_page_once_and_again_when_it_is_taken_away(
    setting: Setting, tmp_path: Path
) -> None:
    async with plugged(make_disk("file", tmp_path / "image"), setting, start=False) as p:
        guest = p.guest
        link = guest.link
        assert isinstance(link, SocketLink)
        iommu = Iommu(guest, link)
        await start(guest, link)
        with trio.fail_after(GUARD):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(iommu.run)
                disk = BlkDriver(guest.queues[0])
                await disk.write(0, pattern(32 << 10, 1))
                assert await disk.read(0, 32 << 10) == pattern(32 << 10, 1)
                asked = len(iommu.asked)
                assert asked >= 8  # the data's pages alone
                for n in range(20):
                    await disk.write(8 * n, pattern(512, n))
                assert len(iommu.asked) == asked
                await iommu.tell(INVALIDATE, guest.memory.gpa, guest.memory.size)
                assert await disk.read(8 * 7, 512) == pattern(512, 7)
                assert len(iommu.asked) > asked
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("setting", [s for s in NATIVE_SETTINGS if s.way == "socket"], ids=str)
async def test_a_disk_serves_a_front_end_that_passes_access_platform_on_and_has_no_iommu(
    setting: Setting, tmp_path: Path
) -> None:
    """libkrun's way: CONFIG and MQ are all it knows of the protocol, and the guest's driver takes what is offered."""
    async with plugged(make_disk("file", tmp_path / "image"), setting, start=False) as p:
        guest, link = p.guest, p.guest.link
        assert isinstance(link, SocketLink)
        front_end, memory = link.front_end, guest.memory
        offered = await link.device_features()
        assert offered & F_ACCESS_PLATFORM
        features = offered if guest.ring == "packed" else offered & ~F_RING_PACKED
        await front_end.send(wire.message(16, wire.u64(wire.MQ | wire.CONFIG)))
        await front_end.send(wire.message(3))
        table = wire.mem_table(wire.region(memory.gpa, memory.size, memory.uva))
        await front_end.send(wire.message(5, table), [os.dup(memory.fd)])
        await front_end.send(wire.message(2, wire.u64(features | wire.F_PROTOCOL_FEATURES)))
        guest.features = features
        queue = guest.add_queue(64)
        base = PACKED_START if guest.ring == "packed" else 0
        await front_end.send(wire.message(8, wire.vring_state(0, 64)))
        await front_end.send(wire.message(10, wire.vring_state(0, base)))
        await front_end.send(wire.message(9, wire.vring_addr(0, *queue.areas)))
        await front_end.send(wire.message(12, wire.u64(0)), [os.dup(queue.kick_fd)])
        await front_end.send(wire.message(13, wire.u64(0)), [os.dup(queue.call_fd)])
        await front_end.send(wire.message(18, wire.vring_state(0, 1)))
        disk = BlkDriver(queue)
        with trio.fail_after(GUARD):
            await disk.write(0, pattern(32 << 10, 1))
            assert await disk.read(0, 32 << 10) == pattern(32 << 10, 1)
