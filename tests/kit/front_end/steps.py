"""A front-end that says one thing of a queue at a time, in whatever order a test likes, over a real socket."""

from __future__ import annotations

import os

import kit.front_end.vhost_user_wire as wire
from kit.front_end.frontend import Guest, Plugged
from kit.front_end.links import SocketLink
from kit.front_end.vhost_user_wire import FrontEnd, u64, vring_addr, vring_state

from virtio.testing.queue import GuestQueue


def front_end_of(guest: Guest) -> FrontEnd:
    assert isinstance(guest.link, SocketLink)
    return guest.link.front_end


class Teller:
    """A front-end that says one thing of a queue at a time; it asks for a reply to each."""

    def __init__(self, guest: Guest, queue: GuestQueue) -> None:
        self.guest = guest
        self.queue = queue
        self.front_end = front_end_of(guest)

    async def do(self, request: int, payload: bytes = b"", *fds: int) -> None:
        assert await self.front_end.do(request, payload, [os.dup(fd) for fd in fds]) == 0

    async def features(self) -> None:
        await self.do(2, u64(self.guest.features | wire.F_PROTOCOL_FEATURES))

    async def memory(self) -> None:
        memory = self.guest.memory
        await self.do(5, wire.mem_table(wire.region(memory.gpa, memory.size, memory.uva)), memory.fd)

    async def num(self) -> None:
        await self.do(8, vring_state(self.queue.index, self.queue.driver.size))

    async def base(self, base: int | None = None) -> None:
        await self.do(10, vring_state(self.queue.index, self.queue.driver.base if base is None else base))

    async def addr(self) -> None:
        await self.do(9, vring_addr(self.queue.index, *self.queue.areas))

    async def call(self) -> None:
        await self.do(13, u64(self.queue.index), self.queue.call_fd)

    async def err(self) -> None:
        await self.do(14, u64(self.queue.index), self.queue.err_fd)

    async def kick(self) -> None:
        await self.do(12, u64(self.queue.index), self.queue.kick_fd)

    async def enable(self, on: bool = True) -> None:
        await self.do(18, vring_state(self.queue.index, int(on)))

    async def everything(self) -> None:
        for step in (self.num, self.base, self.addr, self.call, self.err, self.kick, self.enable):
            await step()


async def prepare(p: Plugged, size: int = 16) -> Teller:
    """A guest that knows which features it will accept and has said nothing of them."""
    features = await p.guest.link.device_features() & ~wire.F_ACCESS_PLATFORM
    p.guest.features = features if p.guest.ring == "packed" else features & ~wire.F_RING_PACKED
    return Teller(p.guest, p.guest.add_queue(size))
