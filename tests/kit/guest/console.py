"""The guest's and the host's end of a console, for its tests."""

from __future__ import annotations

import trio
from kit.front_end.frontend import Guest

from virtio.testing.queue import GuestQueue

RECEIVE, TRANSMIT = 0, 1
KIB = 1 << 10


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more, f"the stream ended after {len(data)} of {size} bytes"
        data += more
    return data


async def type_in(guest: Guest, data: bytes, *, at_once: int = 4 * KIB, queue: int = TRANSMIT) -> None:
    """The guest prints ``data``: every buffer has come back when this returns."""
    ring = guest.queues[queue]
    pieces = [data[n : n + at_once] for n in range(0, len(data), at_once)]
    for first in range(0, len(pieces), 16):
        for piece in pieces[first : first + 16]:
            ring.driver.add([piece], [])
        ring.kick()
        await ring.used(len(pieces[first : first + 16]))


async def take(ring: GuestQueue, size: int, *, room: int = 4 * KIB) -> bytes:
    """What the guest gets to read: exactly ``size`` bytes, through buffers of ``room``."""
    data = b""
    while len(data) < size:
        used = await ring.request([], [min(room, size - len(data))])
        assert used.written > 0
        data += used.buffers[0][: used.written]
    return data
