"""The two ways to drive a queue, behind one face: by a native worker, or by a trio task that pumps it."""

from __future__ import annotations

from functools import partial
from typing import Final, Protocol, TypeVar

import structlog
import trio

from virtio.backend.device_calls import DEVICE, MISTAKES, DeviceCalls
from virtio.device import Device
from virtio.errors import GuestError
from virtio.fd import OwnedFd
from virtio.native.disk import NativeDevice
from virtio.native.memory import MemoryTable
from virtio.native.pump import Queue
from virtio.native.virtqueue import Virtqueue
from virtio.native.worker import Worker
from virtio.waist import Doorbell

log = structlog.get_logger()

E = TypeVar("E", bound=BaseException)

KEPT_SECONDS: Final = 5.0
"""How long ``queue_stopping`` may take, and after it a device to give back the chains of a queue that stops."""


class QueueDriver(Protocol):
    """What the backend asks of whoever drives a queue; all but ``start`` only between ``start`` and ``stop``."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def set_memory(self, table: MemoryTable) -> None: ...
    async def set_doorbell(self, kind: Doorbell, fd: OwnedFd | None) -> None: ...
    async def set_call(self, fd: OwnedFd | None) -> None: ...
    async def set_err(self, fd: OwnedFd | None) -> None: ...
    async def resume(self) -> None: ...


class WorkerQueue:
    """A queue of a native device."""

    def __init__(self, vq: Virtqueue, worker: Worker, device: NativeDevice) -> None:
        self._vq = vq
        self._worker = worker
        self._device = device

    async def start(self) -> None:
        await self._worker.attach(self._vq, self._device)

    async def stop(self) -> None:
        await self._worker.detach(self._vq)

    async def set_memory(self, table: MemoryTable) -> None:
        await self._worker.set_memory(self._vq, table)

    async def set_doorbell(self, kind: Doorbell, fd: OwnedFd | None) -> None:
        await self._worker.set_doorbell(self._vq, kind, fd)

    async def set_call(self, fd: OwnedFd | None) -> None:
        await self._worker.set_call(self._vq, fd)

    async def set_err(self, fd: OwnedFd | None) -> None:
        await self._worker.set_err(self._vq, fd)

    async def resume(self) -> None:
        await self._worker.resume(self._vq)


class PumpedQueue:
    """A queue of a Python device: while it runs, one task of ``nursery`` is in ``device.run_queue``."""

    def __init__(self, vq: Virtqueue, device: Device, calls: DeviceCalls, nursery: trio.Nursery) -> None:
        self._vq = vq
        self._device = device
        self._calls = calls
        self._nursery = nursery
        self._queue: Queue | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def start(self) -> None:
        self._queue = Queue(self._vq, self._device.request_max)
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._nursery.start_soon(self._run, self._queue)

    async def _run(self, queue: Queue) -> None:
        DEVICE.set(self._device.name)
        try:
            with self._scope:
                async with trio.open_nursery() as queue.spawned:
                    await self._device.run_queue(queue)
        except* GuestError as group:
            error = _first(group)
            self._vq.break_queue(max(error.head, 0), error.gpa, error.length)
            queue.withdraw()
        except* MISTAKES as group:
            # The device's own mistake: it costs this queue and nothing else, and its traceback is told once.
            log.error("device failed", device=self._device.name, queue=queue.index, exc_info=_first(group))
            self._vq.device_failed()
            queue.withdraw()
        finally:
            self._ended.set()

    async def stop(self) -> None:
        assert self._queue is not None
        self._scope.cancel()
        await self._ended.wait()
        with trio.move_on_after(KEPT_SECONDS) as waiting:
            if not await self._calls.go_on_async("queue_stopping", partial(self._device.queue_stopping, self._queue)):
                self._vq.device_failed()
        if waiting.cancelled_caught:
            self._complain(f"its queue_stopping() has not returned for {KEPT_SECONDS:g} seconds: it was cancelled")
        with trio.move_on_after(KEPT_SECONDS):
            await self._queue.drained()
        kept = self._queue.withdraw()
        if kept:
            # Whoever stops a queue (a reset, another front-end, the end of the daemon) does not wait for ever.
            self._complain(f"it has not given back {kept} chains of a queue that stops: they go back empty")
        self._queue = None

    def _complain(self, what: str) -> None:
        log.error("device failed", device=self._device.name, queue=self._vq.index, error=what)

    async def set_memory(self, table: MemoryTable) -> None:
        self._vq.set_memory(table)

    async def set_doorbell(self, kind: Doorbell, fd: OwnedFd | None) -> None:
        assert self._queue is not None
        self._queue.leave_doorbells()
        self._vq.set_doorbell(kind, fd)

    async def set_call(self, fd: OwnedFd | None) -> None:
        self._vq.set_call(fd)

    async def set_err(self, fd: OwnedFd | None) -> None:
        self._vq.set_err(fd)

    async def resume(self) -> None:
        # Only the ring was parked: what the device has taken, and what it spawned, runs on. The task may be waiting for
        # a kick that will not come, so it looks at the ring once.
        self._vq.resume()
        if self._queue is not None:  # None: it has just stopped
            self._queue.leave_doorbells()


def _first(group: BaseExceptionGroup[E]) -> E:
    """One of the errors inside: the others, if any, came of the same moment, and the queue breaks only once."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
