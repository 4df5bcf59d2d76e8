"""Testing a device without any guest: ``async with attach(device) as driver``.

This is the public half of the kit, with the same promise as ``virtio`` itself; ``virtio.testing.driver`` has the rings
for those who want to get something wrong on purpose.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Literal

import trio

from virtio.backend.backend import Backend
from virtio.device import Device
from virtio.fd import OwnedFd
from virtio.native.worker import Worker
from virtio.testing.driver import GuestMemory, PackedDriver, SplitDriver
from virtio.testing.queue import GUARD, GuestQueue
from virtio.waist import PACKED_BASE_INITIAL, AddressSpace, ConfigChanged, MemoryRegion, QueueSetup

__all__ = ["TestDriver", "attach"]

_F_EVENT_IDX: Final = 1 << 29
_F_ACCESS_PLATFORM: Final = 1 << 33
_F_RING_PACKED: Final = 1 << 34


class TestDriver:
    """The driver of one device: its features, its config space, and its queues, which run."""

    __test__ = False  # not a class of tests, whatever its name begins with

    def __init__(self, backend: Backend, memory: GuestMemory, features: int, queue_size: int) -> None:
        self.features = features
        self.queues: list[GuestQueue] = []
        self._backend = backend
        self._memory = memory
        self._queue_size = queue_size

    async def request(self, queue_index: int, readable: bytes = b"", writable: int = 0) -> bytes:
        """Send ``readable`` with room for ``writable`` bytes and wait; what the device wrote."""
        used = await self.queues[queue_index].request([readable] if readable else [], [writable] if writable else [])
        return b"".join(used.buffers)[: used.written]

    def post(self, queue_index: int, readable: bytes = b"", writable: int = 0) -> int:
        """Make a buffer available and kick, without waiting; its token, which ``answers`` tells."""
        queue = self.queues[queue_index]
        token = queue.driver.add([readable] if readable else [], [writable] if writable else [])
        queue.kick()
        return token

    async def answers(self, queue_index: int, count: int = 1) -> list[tuple[int, bytes]]:
        """Wait for ``count`` buffers to come back: tokens, and what the device wrote, in the order it gave them."""
        used = await self.queues[queue_index].used(count)
        return [(each.token, b"".join(each.buffers)[: each.written]) for each in used]

    def read_config(self, offset: int = 0, size: int = 256) -> bytes:
        return self._backend.read_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        self._backend.write_config(offset, data)

    async def config_changed(self) -> None:
        """Wait until the device says that its config space changed."""
        with trio.fail_after(GUARD):
            while not isinstance(await self._backend.next_event(), ConfigChanged):
                pass

    async def broken(self, queue_index: int) -> None:
        """Wait until the device has given the queue up, for the driver broke the specification or it failed itself."""
        await self.queues[queue_index].broken()

    async def reset(self) -> None:
        """Reset the device and set it up anew, as when a guest reboots."""
        await self._backend.reset()
        self._forget()
        await self._start()

    async def _start(self) -> None:
        memory = self._memory
        self._backend.set_driver_features(self.features)
        region = MemoryRegion(memory.gpa, memory.size, memory.uva, 0, OwnedFd(os.dup(memory.fd)))
        await self._backend.set_memory([region])
        packed = bool(self.features & _F_RING_PACKED)
        make = PackedDriver if packed else SplitDriver
        for index in range(self._backend.queue_count):
            ring = make(memory, self._queue_size, event_idx=bool(self.features & _F_EVENT_IDX))
            queue = GuestQueue(index, ring)
            self.queues.append(queue)
            setup = QueueSetup(ring.size, *queue.areas, PACKED_BASE_INITIAL if packed else 0, AddressSpace.UVA)
            await self._backend.configure_queue(index, setup)
            await self._backend.set_err(index, OwnedFd(os.dup(queue.err_fd)))
            await self._backend.set_call(index, OwnedFd(os.dup(queue.call_fd)))
            await self._backend.set_kick(index, OwnedFd(os.dup(queue.kick_fd)))
            await self._backend.enable_queue(index, True)

    def _forget(self) -> None:
        for queue in self.queues:
            queue.close()
        self.queues.clear()


@asynccontextmanager
async def attach(
    device: Device,
    *,
    ring: Literal["split", "packed"] = "split",
    queue_size: int = 64,
    without: Sequence[int] = (),
    memory_size: int = 4 << 20,
) -> AsyncIterator[TestDriver]:
    """Serve ``device`` and drive it. All features it offers are accepted but the bit numbers of ``without``.

    At the end of the block the device is reset and closed. ``ring``: the format of the queues (2.7 and 2.8).
    """
    async with AsyncExitStack() as stack:
        stack.callback(device.close)
        memory = stack.enter_context(GuestMemory(memory_size))
        workers = [await stack.enter_async_context(Worker("test"))] if device.native else []
        backend = await stack.enter_async_context(Backend(device, workers=workers))
        features = backend.device_features() & ~sum(1 << bit for bit in set(without)) & ~_F_ACCESS_PLATFORM
        if ring == "split":
            features &= ~_F_RING_PACKED
        driver = TestDriver(backend, memory, features, queue_size)
        await driver._start()
        stack.callback(driver._forget)
        yield driver
