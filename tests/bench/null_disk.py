"""A disk without storage, in Python: what a device of the kit costs, beside native ones under the same driver."""

from __future__ import annotations

import struct
from typing import ClassVar, Final

from pydantic import Field

from virtio import Chain, Device, DeviceOptions, GuestError, Queue

SECTOR_SIZE: Final = 512
HEADER: Final = struct.Struct("<IIQ")  # type, reserved, sector (virtio 1.3, 5.2.6)
IN: Final = 0
STATUS_OK: Final = b"\0"
STATUS_UNSUPPORTED: Final = b"\2"
CONFIG: Final = struct.Struct("<Q26xH")  # capacity in sectors, and num_queues (5.2.4)


class NullDiskOptions(DeviceOptions):
    size: int = Field(gt=0, description="in bytes")


class NullDisk(Device):
    """Reads give zeroes; nothing else is supported."""

    virtio_id: ClassVar[int] = 2
    type_name = "null-disk"
    feature_bits: ClassVar = {"MQ": 12}
    queue_counts = (1, 16)
    ops = ("read",)
    Options = NullDiskOptions

    def config_space(self) -> bytes:
        return CONFIG.pack(self.options.size // SECTOR_SIZE, self.queue_count)

    async def handle(self, queue: Queue, chain: Chain) -> None:
        request = chain.read()
        if len(request) < HEADER.size or chain.writable_length < 1:
            raise GuestError("a request of a disk begins with 16 bytes and ends with its status (5.2.6)")
        kind, _, _ = HEADER.unpack_from(request)
        answered = chain.write(bytes(chain.writable_length - 1))
        chain.failed = kind != IN or answered % SECTOR_SIZE != 0
        chain.write(STATUS_UNSUPPORTED if chain.failed else STATUS_OK)
