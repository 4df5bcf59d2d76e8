"""The I2C adapter device (section 5.21): a bus on which the guest talks to chips.

Requests that belong together (VIRTIO_I2C_FLAGS_FAIL_NEXT on all but the last) are one transaction, with repeated
starts and no stop between them, as far as the driver makes them available without a pause: one whose ring is too small
for all of them waits for the first ones before it sends the others.
"""

from __future__ import annotations

import errno
import struct
from typing import ClassVar, Final

import structlog
import trio

from virtio import spec
from virtio.device import Chain, Device, Queue
from virtio.devices.i2c.adapter import AdapterBus
from virtio.devices.i2c.bus import Bus, Segment
from virtio.devices.i2c.options import I2cOptions
from virtio.devices.i2c.simulated import SimulatedBus
from virtio.errors import GuestError, HostError

VIRTIO_I2C_F_ZERO_LENGTH_REQUEST: Final = 0

VIRTIO_I2C_FLAGS_FAIL_NEXT: Final = 1 << 0
VIRTIO_I2C_FLAGS_M_RD: Final = 1 << 1
VIRTIO_I2C_MSG_OK: Final = 0
VIRTIO_I2C_MSG_ERR: Final = 1

SEGMENTS_MAX: Final = 42
"""Segments of one transaction: what Linux's own adapters take at once (I2C_RDWR_IOCTL_MAX_MSGS)."""

PAUSE_SECONDS: Final = 0.02
"""How long the next request of a group may take to come: the driver may be adding them one by one as we look."""

SEGMENT_MAX: Final = 8192
"""Bytes of one segment: what i2c-dev takes at once. Larger ones fail."""

REQUEST_MAX: Final = 0x10000
"""Bytes of one request, either way: a Linux driver cannot even express more (struct i2c_msg)."""

_HEADER: Final = struct.Struct("<HHI")  # 5.21.6.1: addr, padding, flags

log = structlog.get_logger()


class _Request:
    """One request of the driver's, taken apart. ``segment`` is ``None`` when it makes no sense."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        header = chain.read(_HEADER.size)
        address, _, flags = _HEADER.unpack(header) if len(header) == _HEADER.size else (0xFFFF, 0, 0)
        self.goes_on = bool(flags & VIRTIO_I2C_FLAGS_FAIL_NEXT)
        self.room = max(0, chain.writable_length - 1)
        if self.room > REQUEST_MAX or chain.readable_length > _HEADER.size + REQUEST_MAX:
            raise GuestError(f"a segment of more than {REQUEST_MAX} bytes", queue_index=0, head=chain.head)
        self.segment: Segment | None = None
        place = decode_address(address)
        known = flags & ~(VIRTIO_I2C_FLAGS_FAIL_NEXT | VIRTIO_I2C_FLAGS_M_RD) == 0
        if place is None or not known or chain.writable_length == 0:
            return
        if self.room > SEGMENT_MAX or chain.readable_length > _HEADER.size + SEGMENT_MAX:
            return
        data = chain.read()
        if flags & VIRTIO_I2C_FLAGS_M_RD:
            if not data:
                self.segment = Segment(*place, read=True, length=self.room)
        elif self.room == 0:
            self.segment = Segment(*place, read=False, data=data)

    def answer(self, result: bytes | None) -> None:
        """What was read, in full, then the status byte, which is the last one of the buffer."""
        status = VIRTIO_I2C_MSG_OK if result is not None else VIRTIO_I2C_MSG_ERR
        self.chain.failed = result is None
        self.chain.op = 1 if self.segment is not None and self.segment.read else 0
        self.chain.write((result or b"").ljust(self.room, b"\0") + bytes([status]))


def decode_address(field: int) -> tuple[int, bool] | None:
    """The address in 5.21.6.1's format, and whether it has ten bits."""
    if field & 0xF9 == 0xF0:  # before the other: 0x78 to 0x7b are no addresses of seven bits
        return (field & 0x06) << 7 | field >> 8, True
    if field & 0xFF01 == 0:
        return field >> 1, False
    return None


class I2c(Device):
    """An adapter of the host, or a simulated bus."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_I2C_ADAPTER
    type_name = "i2c"
    files_may_hang = True
    answers_in_order = True
    ops = ("write", "read")
    Options = I2cOptions
    feature_bits = {"VIRTIO_I2C_F_ZERO_LENGTH_REQUEST": VIRTIO_I2C_F_ZERO_LENGTH_REQUEST}

    def __init__(self, name: str, options: I2cOptions, queues: int, queue_size: int) -> None:
        super().__init__(name, options, queues, queue_size)
        self.bus: Final[Bus] = (
            AdapterBus(options.adapter, options.addresses)
            if options.adapter is not None
            else SimulatedBus(options.chips, options.control)
        )
        self._failing = False  # 5.21.6.1: the group that goes on has failed, so what is left of it fails too
        self._told = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self.bus.run(task_status=task_status)

    async def run_queue(self, queue: Queue) -> None:
        while True:
            requests = await self._next_group(queue)
            # A stop must not come between what happens on the bus and its answer: it would happen twice.
            with trio.CancelScope(shield=True):
                for request, result in zip(requests, await self._carry_out(requests), strict=True):
                    request.answer(result)
                queue.push([request.chain for request in requests])
            await trio.lowlevel.checkpoint()

    async def _next_group(self, queue: Queue) -> list[_Request]:
        """A request, and those that belong to it."""
        requests = [_Request(await queue.next_chain())]
        try:
            while requests[-1].goes_on and len(requests) < SEGMENTS_MAX:
                chain = queue.chain_at_hand()
                if chain is None:
                    with trio.move_on_after(PAUSE_SECONDS):
                        chain = await queue.next_chain()
                if chain is None:
                    break
                requests.append(_Request(chain))
        except trio.Cancelled:  # the queue stops, and nothing has happened on the bus yet
            for request in reversed(requests):
                queue.put_back(request.chain)
            raise
        except GuestError:
            queue.push([request.chain for request in requests])  # unanswered; the queue breaks
            raise
        return requests

    async def _carry_out(self, requests: list[_Request]) -> list[bytes | None]:
        """What each came to; ``None``: it failed, or was not tried."""
        results: list[bytes | None] = []
        if self._may_try():
            segments: list[Segment] = []
            for request in requests:
                if request.segment is None:
                    break
                segments.append(request.segment)
            try:
                results += await self.bus.transfer(segments) if segments else []
            except HostError as error:
                number = errno.errorcode.get(error.errno, "")
                log.warning("a transfer failed on the host", device=self.name, error=str(error), errno=number)
        results += [None] * (len(requests) - len(results))
        self._failing = requests[-1].goes_on and None in results
        return results

    def _may_try(self) -> bool:
        if not self.driver_features >> VIRTIO_I2C_F_ZERO_LENGTH_REQUEST & 1:
            # 5.21.6.4: such a driver is to be rejected, and nothing it could be told at negotiation would reach it.
            if not self._told:
                self._told = True
                log.warning("a driver without VIRTIO_I2C_F_ZERO_LENGTH_REQUEST gets nothing", device=self.name)
            return False
        return not self._failing

    def reset(self) -> None:
        self._failing = False

    def close(self) -> None:
        self.bus.close()
