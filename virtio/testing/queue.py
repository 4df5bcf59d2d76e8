"""One queue of a guest: the driver's side of the ring, and its three eventfds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Final

import trio

from virtio.testing.driver import Used, VirtqueueDriver

GUARD: Final = 20.0
"""Seconds after which a wait has failed. Nothing ever takes that long."""


class GuestQueue:
    """What a guest kernel does with a queue. ``driver`` has the ring itself, for what a driver may get wrong."""

    def __init__(self, index: int, driver: VirtqueueDriver) -> None:
        self.index = index
        self.driver = driver
        self.kick_fd, self.call_fd, self.err_fd = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3))

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    @property
    def areas(self) -> tuple[int, int, int]:
        """The user virtual addresses of descriptor table, avail and used ring."""
        to_uva = self.driver.memory.to_uva
        return to_uva(self.driver.desc), to_uva(self.driver.avail), to_uva(self.driver.used_area)

    def kick(self) -> None:
        """As a guest kernel kicks: only where the device wants it."""
        self.driver.kick_if_needed(self.kick_fd)

    def ring(self) -> None:
        """Kick whether the device wants it or not."""
        os.eventfd_write(self.kick_fd, 1)

    async def used(self, count: int = 1) -> list[Used]:
        """Wait until ``count`` buffers (or more) came back. ``trio.TooSlowError`` after ``GUARD`` seconds."""
        back: list[Used] = []
        with trio.fail_after(GUARD):
            while True:
                back += self.driver.used()
                if len(back) >= count:
                    return back
                if self.driver.want_interrupts(True):
                    continue
                await self.interrupt()

    async def interrupt(self) -> None:
        """Wait until the call eventfd was signalled."""
        with trio.fail_after(GUARD):
            await trio.lowlevel.wait_readable(self.call_fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.call_fd)

    async def request(self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False) -> Used:
        """One buffer there and back, with nothing else under way."""
        self.driver.add(readable, writable, indirect=indirect)
        self.kick()
        (used,) = await self.used()
        return used

    async def broken(self) -> None:
        """Wait until the device says that it gave the queue up."""
        with trio.fail_after(GUARD):
            await trio.lowlevel.wait_readable(self.err_fd)
        assert os.eventfd_read(self.err_fd) == 1
