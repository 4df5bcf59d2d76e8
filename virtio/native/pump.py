"""How a trio task drives a queue for a Python device: the same rings, checks and counters as a worker's.

``Queue`` is what a device sees. By default its chains are handed to ``device.handle`` one by one, inline and in
order, and go back to the driver in batches. A device that only needs a chain when it has something to say (a
console's receive queue) pulls with ``await queue.next_chain()`` instead.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from virtio.dataplane import ffi
from virtio.native.chain import Chain
from virtio.native.virtqueue import Virtqueue
from virtio.waist import PACKED_BASE_INITIAL, Doorbell

BATCH: Final = 64
"""Chains popped at once, or fewer that hold a MiB."""

TURN_NS: Final = 500_000
"""How long a queue is served before the other tasks of the daemon have their turn: other guests' queues, their control
planes. One chain is never interrupted, so a device does little for each, or waits in between."""

now_ns: Callable[[], int] = time.monotonic_ns

POLL_SECONDS: Final = 0.001
"""How often a queue without a kick fd is looked at (vhost-user: the invalid-fd flag asks for polling)."""


BEGINNINGS: Final = (0, PACKED_BASE_INITIAL)
"""The base of a split and of a packed ring that was never used."""


class Queue:
    """One running queue of a Python device. ``index`` is the virtqueue's index (section 5, "Virtqueues")."""

    def __init__(self, vq: Virtqueue, request_max: int) -> None:
        self.index = vq.index
        self._request_max = request_max
        self._vq = vq
        self._room = ffi.new("struct chain *[]", BATCH)
        self.used_before = vq.base not in BEGINNINGS
        """The driver used the ring before it came to us: it does not stand at its beginning."""
        self._outstanding: dict[Chain, None] = {}  # what the device has, oldest first
        self._idle = trio.Event()
        self._waiting: trio.CancelScope | None = None  # for a doorbell
        self._turn_began = now_ns()
        self.spawned: trio.Nursery  # for as long as the queue runs

    def _pop(self, limit: int, *, as_they_come: bool = False) -> list[Chain]:
        count = self._vq.pop_many(self._room, limit, self._request_max, as_they_come=as_they_come)
        chains = [Chain(self, self._room[i]) for i in range(count)]
        self._outstanding.update(dict.fromkeys(chains))
        return chains

    def push(self, chains: Sequence[Chain]) -> None:
        """Return chains to the driver, with one notification for all of them."""
        chains = [chain for chain in chains if not chain.withdrawn]
        if not chains:
            return
        written = [chain.written for chain in chains]
        for chain in chains:
            chain.account()
        self._vq.push_many([chain.release() for chain in chains], written)
        self._gave_back(chains)

    def _rewind(self, chains: Sequence[Chain]) -> None:
        chains = [chain for chain in chains if not chain.withdrawn]
        self._vq.rewind([chain.release() for chain in chains])
        self._gave_back(chains)

    def _gave_back(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            del self._outstanding[chain]
        if not self._outstanding:
            self._idle.set()

    def spawn(self, work: Callable[[Queue, Chain], Awaitable[None]], chain: Chain) -> None:
        """Take ``chain`` and let ``work`` serve it beside the queue, so that others are served meanwhile.

        It goes back to the driver when ``work`` ends: out of order where others were faster (2.7.8.2 allows it). When
        the queue stops, ``work`` is cancelled and the chain returned with what was written to it until then. What
        ``work`` raises breaks the queue, as it would in ``handle``.
        """
        self.spawned.start_soon(self._work, work, chain.take())

    async def _work(self, work: Callable[[Queue, Chain], Awaitable[None]], chain: Chain) -> None:
        try:
            await work(self, chain)
        finally:
            if not chain.returned:
                chain.complete()

    def withdraw(self) -> int:
        """The device failed, or forgot: give back empty what it still has, and how many. It has no effect any more."""
        left = [*self._outstanding]
        for chain in left:
            chain.written, chain.failed = 0, True
        self.push(left)
        for chain in left:
            chain.withdrawn = True
        return len(left)

    async def drained(self) -> None:
        """Wait until every chain went back to the driver."""
        while self._outstanding:
            self._idle = trio.Event()
            await self._idle.wait()

    async def _wait_for_kick(self) -> None:
        if not self._vq.arm():
            return
        fds = [fd for kind in Doorbell if (fd := self._vq.doorbell_fd(kind)) >= 0]
        with trio.CancelScope() as self._waiting:
            if self._vq.broken:
                await trio.sleep_forever()  # its eventfd may be one that is readable for ever
            elif self._vq.doorbell_fd(Doorbell.KICK) < 0:
                await trio.sleep(POLL_SECONDS)
            elif len(fds) == 1:
                await trio.lowlevel.wait_readable(fds[0])
            else:
                await _any_readable(fds)
        self._waiting = None
        self._vq.take_kicks()
        self._vq.disarm()

    def leave_doorbells(self) -> None:
        """A doorbell is about to change: the counts are taken, and when this returns no eventfd is waited for.

        The device's task then looks at the ring, and waits for the doorbells there are by then.
        """
        self._vq.take_kicks()
        if self._waiting is not None:
            self._waiting.cancel()  # the poll set is left at once, before the task runs again

    @property
    def turn_is_over(self) -> bool:
        """Whether other tasks of the daemon should run now: see ``next_chain``."""
        return now_ns() - self._turn_began >= TURN_NS

    async def _let_others_run(self) -> None:
        await trio.lowlevel.checkpoint()
        self._turn_began = now_ns()

    def chain_at_hand(self) -> Chain | None:
        """The next chain of the queue, taken, if the driver made one available: the caller completes it."""
        chains = self._pop(1)
        if not chains:
            return None
        return chains[0].take()

    def put_back(self, chain: Chain) -> None:
        """Un-pop the chain that was taken last and is not needed: the next pop finds it again."""
        self._rewind([chain])

    async def next_chain(self) -> Chain:
        """The next chain of the queue, taken: the caller completes it. Waits for the driver where there is none."""
        if self.turn_is_over:
            await self._let_others_run()
        while True:
            chain = self.chain_at_hand()
            if chain is not None:
                return chain
            await self._wait_for_kick()
            self._turn_began = now_ns()

    async def serve(self, handle: Callable[[Queue, Chain], Awaitable[None]]) -> None:
        """Hand every chain to ``handle``, for ever. Cancelled in the middle, what was not handled is un-popped."""
        while True:
            chains = self._pop(BATCH, as_they_come=True)
            if not chains:
                await self._wait_for_kick()
                continue
            done: list[Chain] = []
            handled = 0
            self._turn_began = now_ns()
            try:
                for chain in chains:
                    if handled and self.turn_is_over:
                        self.push(done)  # whoever waits for these need not wait for the rest
                        done = []
                        await self._let_others_run()
                    await handle(self, chain)
                    handled += 1
                    if not chain.taken:
                        done.append(chain)
            finally:
                if handled < len(chains):
                    self._rewind([chain for chain in chains[handled:] if not chain.taken])
                if done:
                    self.push(done)
            await trio.lowlevel.checkpoint()


async def _any_readable(fds: Sequence[int]) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(fd: int) -> None:
            await trio.lowlevel.checkpoint_if_cancelled()  # the fd may be gone since this task was made
            await trio.lowlevel.wait_readable(fd)
            nursery.cancel_scope.cancel()

        for fd in fds:
            nursery.start_soon(wait, fd)
