"""Devices for tests: one alike for each way a queue can be driven, and Python ones that do as the test says."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import ClassVar, Final

import pytest
import trio

from virtio.device import Chain, Device, DeviceOptions, Queue
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.testing.queue import GuestQueue

DRIVEN: Final = ("pump", "io_uring", "epoll")
every_driven = pytest.mark.parametrize("driven", DRIVEN)

_GET_ID: Final = struct.pack("<IIQ", 8, 0, 0)


class Echo(Device):
    """Writes back what it reads."""

    virtio_id: ClassVar[int] = 42
    type_name = "echo"
    queue_counts = (1, 8)

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(chain.read())


class Scripted(Device):
    """Handles chains as the test says."""

    virtio_id: ClassVar[int] = 42
    type_name = "scripted"
    queue_counts = (1, 8)
    ops = ("request", "special")

    def __init__(self, queues: int = 1) -> None:
        super().__init__("scripted", DeviceOptions(), queues, 256)
        self.script: Callable[[Queue, Chain], Awaitable[None]] = self.answer
        self.seen: list[bytes] = []
        self.taken: list[Chain] = []
        self.stopping: Callable[[], None] = lambda: None

    async def handle(self, queue: Queue, chain: Chain) -> None:
        await self.script(queue, chain)

    async def answer(self, queue: Queue, chain: Chain) -> None:
        data = chain.read()
        self.seen.append(data)
        chain.write(data.upper())

    async def keep(self, queue: Queue, chain: Chain) -> None:
        self.taken.append(chain.take())

    async def queue_stopping(self, queue: Queue) -> None:
        self.stopping()


class Pulling(Device):
    """Takes a chain only when it has something to say."""

    virtio_id: ClassVar[int] = 42
    type_name = "pulling"

    def __init__(self) -> None:
        super().__init__("pulling", DeviceOptions(), 1, 64)
        self.send, self.receive = trio.open_memory_channel[bytes](10)

    async def run_queue(self, queue: Queue) -> None:
        while True:
            chain = await queue.next_chain()
            try:
                text = await self.receive.receive()
            except trio.Cancelled:
                chain.complete()  # empty-handed
                raise
            chain.write(text)
            if text == b"fail":
                raise RuntimeError("as asked")
            chain.complete()


def make_device(driven: str, queues: int = 1) -> Device:
    """A device with so many queues that answers ``add_request``."""
    if driven == "pump":
        return Echo("echo", DeviceOptions(), queues, 64)
    return Blk("disk", BlkOptions(backend="memory", size=1 << 20, serial="x" * 20), queues, 64)


def add_request(queue: GuestQueue) -> int:
    """Make a request available that each of them answers; its token. It takes three descriptors."""
    return queue.driver.add([_GET_ID], [20, 1])


async def check_it_works(queue: GuestQueue, times: int = 3) -> None:
    """Requests are answered, kick by kick."""
    for _ in range(times):
        token = add_request(queue)
        queue.kick()
        (used,) = await queue.used()
        assert used.token == token
        assert used.written in (16, 21)
        assert used.buffers[0] in (_GET_ID + bytes(4), b"x" * 20)
