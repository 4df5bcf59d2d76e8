"""One device for each way a queue can be driven, alike enough that one test of the back-end does for all three."""

from __future__ import annotations

import struct
from typing import ClassVar, Final

import pytest
from frontend import GuestQueue

from virtio.device import Chain, Device, DeviceOptions, Queue
from virtio.devices.blk import Blk, BlkOptions

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
