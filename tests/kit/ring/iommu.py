"""A front-end with an IOMMU: it answers misses page by page, as late as a test says."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from kit.front_end.frontend import F_RING_PACKED, PACKED_START, Guest, Plugged, Setting, plugged
from kit.front_end.links import F_ACCESS_PLATFORM
from kit.ring.driven import make_device

from virtio.device import Device
from virtio.fd import OwnedFd
from virtio.testing.queue import GUARD, GuestQueue
from virtio.waist import IotlbMiss, MemoryRegion, Permission, QueueBroken

PAGE = 4096
READ, WRITE = Permission.READ, Permission.WRITE
BOTH = READ | WRITE


class Iommu:
    """The front-end's side: answers misses page by page, once ``gate`` is open.

    The driver's addresses are I/O virtual ones here: its guest memory lies at quite another guest physical address.
    """

    def __init__(self, p: Plugged) -> None:
        self._backend = p.backend
        self._memory = p.guest.memory
        self.gate = trio.Event()
        self.gate.set()
        self.asked: list[IotlbMiss] = []
        self.broken: list[QueueBroken] = []
        self.news = trio.Event()

    async def share_memory(self) -> None:
        memory = self._memory
        region = MemoryRegion(0x1000, memory.size, memory.uva, 0, OwnedFd(os.dup(memory.fd)))
        await self._backend.set_memory([region])

    async def map(self, iova: int, size: int = PAGE, perm: Permission = BOTH) -> None:
        await self._backend.iotlb_update(iova, size, self._memory.to_uva(iova), int(perm))

    async def map_all(self) -> None:
        await self.map(self._memory.gpa, self._memory.size)

    async def unmap_all(self) -> None:
        await self._backend.iotlb_invalidate(self._memory.gpa, self._memory.size)

    async def run(self) -> None:
        while True:
            event = await self._backend.next_event()
            if isinstance(event, QueueBroken):
                self.broken.append(event)
            elif isinstance(event, IotlbMiss):
                self.asked.append(event)
            self.news.set()
            self.news = trio.Event()
            if isinstance(event, IotlbMiss):
                await self.gate.wait()
                await self.map(event.iova & -PAGE)

    async def asked_for(self, count: int) -> None:
        """Wait until so many translations were asked for."""
        with trio.fail_after(GUARD):
            while len(self.asked) < count:
                await self.news.wait()


@asynccontextmanager
async def behind_iommu(
    driven: str, ring: str, *, queues: int = 1, device: Device | None = None, queue_size: int = 64
) -> AsyncIterator[tuple[Plugged, Iommu]]:
    """``device``, or one that ``driven`` says, and a guest whose queues run."""
    setting = Setting("waist", ring, "" if driven == "pump" else driven)
    async with plugged(device or make_device(driven, queues), setting, start=False) as p:
        iommu = Iommu(p)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(iommu.run)
            await start(p.guest, iommu, queues, queue_size)
            yield p, iommu
            nursery.cancel_scope.cancel()


async def start(guest: Guest, iommu: Iommu, queues: int = 1, queue_size: int = 64) -> None:
    offered = await guest.link.device_features()
    assert offered & F_ACCESS_PLATFORM
    guest.features = offered if guest.ring == "packed" else offered & ~F_RING_PACKED
    await guest.link.negotiate(guest.features)
    await iommu.share_memory()
    for _ in range(queues):
        queue = guest.add_queue(queue_size)
        await start_queue(guest, queue, PACKED_START if guest.ring == "packed" else 0)


async def start_queue(guest: Guest, queue: GuestQueue, base: int) -> None:
    driver = queue.driver
    await guest.link.set_up(queue.index, driver.size, (driver.desc, driver.avail, driver.used_area), base)
    await guest.link.set_err(queue.index, queue.err_fd)
    await guest.link.set_call(queue.index, queue.call_fd)
    await guest.link.set_kick(queue.index, queue.kick_fd)
    await guest.link.enable(queue.index, True)
