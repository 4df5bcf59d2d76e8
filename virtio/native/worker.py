"""A native worker: one C thread that drives queues, commanded from trio through a mailbox and two eventfds."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import trio

from virtio.dataplane import check, ffi, lib
from virtio.errors import HostError
from virtio.fd import OwnedFd, take_count
from virtio.native.disk import NativeDevice
from virtio.native.memory import MemoryTable
from virtio.native.stats import WorkerStats
from virtio.native.virtqueue import Virtqueue
from virtio.waist import Doorbell

REACTORS: Final[dict[str, int]] = {
    "auto": lib.REACTOR_AUTO,
    "io_uring": lib.REACTOR_IO_URING,
    "epoll": lib.REACTOR_EPOLL,
}
_REACTOR_NAMES: Final = {number: name for name, number in REACTORS.items()}


def number_ranges(numbers: Iterable[int]) -> str:
    """``{0, 1, 2, 5}`` as ``0-2,5``, the way the configuration takes them."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@dataclass(slots=True)
class _Pending:
    """A command in C's hands, and everything it points to, kept alive until C is done with it."""

    command: Any
    kept: tuple[object, ...]
    done: trio.Event


class Worker:
    """``async with Worker(...) as worker``: the thread runs inside the block and is joined at its end.

    ``cpus``: the CPUs it may run on (none: any). ``poll_us``: the longest time it polls its rings before it sleeps.
    ``reactor``: "io_uring", "epoll", or "auto" (io_uring where the kernel allows it). Raises ``HostError`` when the
    thread cannot be started as asked.
    """

    def __init__(self, name: str, cpus: Sequence[int] = (), poll_us: int = 32, reactor: str = "auto") -> None:
        self.name = name
        self._cpus = tuple(cpus)
        self._poll_us = poll_us
        self._reactor = REACTORS[reactor]
        self._pointer: Any = None
        self._pending: dict[int, _Pending] = {}
        self._tags = itertools.count(1)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Worker:
        await self._stack.enter_async_context(self._running())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        with OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as done_fd:
            self._start(done_fd.fileno())
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._reap, done_fd.fileno())
                    try:
                        yield
                    finally:
                        await self._command(lib.WORKER_QUIT)
                        nursery.cancel_scope.cancel()
            finally:
                lib.worker_free(self._pointer)
                self._pointer = None

    def _start(self, done_fd: int) -> None:
        error = ffi.new("int *")
        thread_name = f"hb-{self.name}"[:15].encode()  # what the kernel keeps of a thread's name
        self._pointer = lib.worker_new(
            thread_name, self._reactor, self._poll_us, list(self._cpus), len(self._cpus), done_fd, error
        )
        if self._pointer == ffi.NULL:
            cpus = f" on CPUs {number_ranges(self._cpus)}" if self._cpus else ""
            check(error[0], f"starting worker {self.name}{cpus}")
            raise HostError(f"starting worker {self.name}{cpus} failed")

    async def _reap(self, done_fd: int) -> None:
        # Shielded: __aexit__ ends it, after the last command was acknowledged.
        with trio.CancelScope(shield=True) as scope:
            while not scope.cancel_called:
                await trio.lowlevel.wait_readable(done_fd)
                take_count(done_fd)  # whatever woke this task, it looks
                command = lib.worker_take_done(self._pointer)
                while command != ffi.NULL:
                    following = command.next
                    pending = self._pending.pop(command.tag)
                    pending.done.set()
                    command = following
                    if pending.command.op == lib.WORKER_QUIT:
                        return

    async def _command(self, op: int, *kept: object, **fields: Any) -> int:
        """Post a command and wait until the worker is done with it; its result (>= 0, or negative)."""
        command = ffi.new("struct worker_command *", {"op": op, "fd": -1, **fields})
        command.tag = tag = next(self._tags)
        pending = self._pending[tag] = _Pending(command, kept, trio.Event())
        lib.worker_post(self._pointer, command)
        with trio.CancelScope(shield=True):
            await pending.done.wait()
        result: int = command.result
        return result

    async def attach(self, vq: Virtqueue, device: NativeDevice) -> None:
        """Drive a configured queue for ``device``; its ring is looked at once."""
        code = await self._command(lib.WORKER_ATTACH, vq, device, vq=vq.pointer, device=device.pointer)
        check(code, f"worker {self.name}: attaching queue {vq.index}")

    async def detach(self, vq: Virtqueue) -> None:
        """Stop driving the queue: returns when nothing of it is in flight any more."""
        await self._command(lib.WORKER_DETACH, vq, vq=vq.pointer)

    async def set_memory(self, vq: Virtqueue, table: MemoryTable) -> None:
        await self._command(lib.WORKER_SET_MEMORY, vq, table, vq=vq.pointer, table=table.pointer)

    async def resume(self, vq: Virtqueue) -> None:
        await self._command(lib.WORKER_RESUME, vq, vq=vq.pointer)

    async def nudge(self, device: NativeDevice) -> None:
        """The device has something to do that is no queue's; done when this returns."""
        await self._command(lib.WORKER_NUDGE, device, device=device.pointer)

    async def set_call(self, vq: Virtqueue, fd: OwnedFd | None) -> None:
        """Takes the fd; ``HostError`` when it is nothing that can be signalled."""
        await self._give(lib.WORKER_SET_CALL, vq, fd, "call")

    async def set_err(self, vq: Virtqueue, fd: OwnedFd | None) -> None:
        await self._give(lib.WORKER_SET_ERR, vq, fd, "err")

    async def set_doorbell(self, vq: Virtqueue, kind: Doorbell, fd: OwnedFd | None) -> None:
        """The queue goes on meanwhile. The old fd is out of the poll set, and closed, when this returns."""
        await self._give(lib.WORKER_SET_DOORBELL, vq, fd, kind.label, doorbell=int(kind))

    async def _give(self, op: int, vq: Virtqueue, fd: OwnedFd | None, name: str, **fields: Any) -> None:
        number = fd.fileno() if fd is not None else -1
        code = await self._command(op, vq, vq=vq.pointer, fd=number, **fields)
        if fd is not None:
            if code >= 0:
                fd.detach()
            else:
                fd.close()
        check(code, f"{name} fd of queue {vq.index}")

    @property
    def reactor(self) -> str:
        """The reactor in use: "io_uring" or "epoll"."""
        return _REACTOR_NAMES[lib.worker_stats(self._pointer).reactor]

    @property
    def reason(self) -> str:
        """Why the reactor is not another: configured, the best there is, or what io_uring failed with."""
        if self._reactor != lib.REACTOR_AUTO:
            return "configured"
        error = lib.worker_stats(self._pointer).uring_error
        return f"no io_uring: {os.strerror(error)}" if error else "available"

    def stats(self) -> WorkerStats:
        """Any thread, while the worker runs: its counters now."""
        raw = lib.worker_stats(self._pointer)
        return WorkerStats(
            name=self.name,
            reactor=_REACTOR_NAMES[raw.reactor],
            wakeups=raw.wakeups,
            poll_hits=raw.poll_hits,
            poll_misses=raw.poll_misses,
            cpu_seconds=lib.worker_cpu_ns(self._pointer) / 1e9,
            reason=self.reason,
        )
