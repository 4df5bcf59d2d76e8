"""One queue of a backend: its ring, its setup, and whether it is started, enabled, running.

It *runs* when it is set up, started (it has a kick) and enabled. ``virtio.backend.backend`` holds the queues and says
what a driver's wish means; here is how a queue starts and stops, and to whom a descriptor goes: to the ring while the
queue stands, to whoever drives it while it runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

import structlog
import trio

from virtio import spec
from virtio.backend.device_calls import DeviceCalls
from virtio.backend.drivers import QueueDriver
from virtio.device import Device
from virtio.errors import HostError, KeptFullError, PeerError
from virtio.fd import OwnedFd, eventfd_id
from virtio.native.memory import MemoryTable
from virtio.native.virtqueue import Virtqueue
from virtio.waist import Doorbell, QueueSetup

log = structlog.get_logger()


class BackendQueue:
    """The queue ``vq`` of ``device``, which ``driver`` drives while it runs."""

    def __init__(self, vq: Virtqueue, driver: QueueDriver, device: Device, calls: DeviceCalls) -> None:
        self.vq = vq
        self.driver = driver
        self.setup: QueueSetup | None = None
        self.started = False
        self.enabled = False
        self.running = False
        self.muted = False  # it runs although it is disabled, to no effect
        self.broken = False
        self.miss_told = 0  # the last miss that became an event
        self.call_told = 0  # why its call fd was given up, as it was logged
        self.moved_told = False
        self._changing = trio.Lock()  # held while the queue starts, stops, or gets another memory table or descriptor
        self._device = device
        self._calls = calls
        self._log = log.bind(device=device.name, queue=vq.index)

    def note_size(self, size: int, driver_features: int) -> None:
        """The driver chose ``size``. Without indirect descriptors no chain is longer than its ring (2.7.5.3.1), and a
        driver with more than that to say would wait for ever."""
        self._device.ring_sizes[self.vq.index] = size
        promised = self._device.promised_chain
        if size < promised and not driver_features >> spec.VIRTIO_F_INDIRECT_DESC & 1:
            self._log.warning(
                "the queue is too small for the requests that its driver may make",
                size=size,
                descriptors=promised,
                hint=f"set queue_size = {size} for this device, or a larger queue in the front-end",
            )

    # ---- starting and stopping ----

    async def run_if_due(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._changing:
                if self.running or not (self.setup is not None and self.started and self.enabled):
                    return
                await self.driver.start()
                self.running = True
        self._tell_device(True)
        self._log.debug("queue runs")

    async def halt(self) -> None:
        """Stop and drain. Nothing of the queue touches guest memory after this, whoever stopped the queue."""
        with trio.CancelScope(shield=True):
            async with self._changing:
                if not self.running:
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._warn_while_draining)
                    await self.driver.stop()
                    nursery.cancel_scope.cancel()
                self.running = False
        self.unmute()
        self._tell_device(False)
        self._log.debug("queue stopped")

    async def _warn_while_draining(self) -> None:
        for waited in range(5, 3600, 5):
            await trio.sleep(5)
            stats = self.vq.stats((), True, time.monotonic_ns())
            self._log.warning("queue drains", seconds=waited, in_flight=stats.inflight)

    def _tell_device(self, running: bool) -> None:
        index = self.vq.index
        if not self._calls.go_on("queue_running", lambda: self._device.queue_running(index, running), queue=index):
            self.give_up()

    def give_up(self) -> None:
        """The device made a mistake: the queue is broken. (A native device has none: a worker may have its queue.)"""
        if not self._device.native:
            self.vq.device_failed()

    def mute(self) -> bool:
        port = self._device.port
        if port is not None:
            self.muted = self._calls.look("mute", lambda: port.mute(self.vq.index, True), False)
        return self.muted

    def unmute(self) -> None:
        port = self._device.port
        if self.muted and port is not None:
            self.muted = False
            self._calls.go_on("mute", lambda: port.mute(self.vq.index, False))

    async def resume(self) -> None:
        """The translation that it waited for is there."""
        with trio.CancelScope(shield=True):
            async with self._changing:
                if self.running:
                    await self.driver.resume()
                else:
                    self.vq.resume()

    async def set_memory(self, table: MemoryTable) -> None:
        with trio.CancelScope(shield=True):
            async with self._changing:
                if self.running:
                    await self.driver.set_memory(table)
                else:
                    self.vq.set_memory_at_rest(table)

    # ---- its descriptors: each passes to the queue; ``PeerError``: it is nothing that can ring, or be signalled ----

    def check_kick(self, fd: OwnedFd | None) -> None:
        """Before anything is changed for its sake."""
        with _refusals():
            self.vq.check_kick(fd)

    def give_kick(self, fd: OwnedFd | None) -> None:
        """While it stands."""
        with _refusals():
            self.vq.set_kick(fd)

    async def set_doorbell(self, kind: Doorbell, fd: OwnedFd | None) -> None:
        await self._give(fd, partial(self.vq.set_doorbell, kind), partial(self.driver.set_doorbell, kind))

    async def set_call(self, fd: OwnedFd | None) -> None:
        self.call_told = 0
        await self._give(fd, self.vq.set_call, self.driver.set_call)

    async def set_err(self, fd: OwnedFd | None) -> None:
        await self._give(fd, self.vq.set_err, self.driver.set_err)

    async def _give(
        self,
        fd: OwnedFd | None,
        while_it_stands: Callable[[OwnedFd | None], None],
        while_it_runs: Callable[[OwnedFd | None], Awaitable[None]],
    ) -> None:
        with _refusals(), trio.CancelScope(shield=True):
            async with self._changing:
                if self.running:
                    await while_it_runs(fd)
                else:
                    while_it_stands(fd)

    def look_at_call(self, error: int) -> None:
        """``error``: why the call fd was given up (errno), 0 while it works. Logged once a descriptor."""
        if error and error != self.call_told:
            self._log.warning(
                "the driver is not interrupted any more: nobody is at the other end of the call fd",
                error=os.strerror(error),
            )
        self.call_told = error

    def take_fds(self) -> None:
        self.vq.clear_doorbells()
        self.vq.set_call(None)
        self.vq.set_err(None)


def number_of(index: int, kick: OwnedFd | None) -> int | None:
    try:
        return eventfd_id(kick.fileno()) if kick is not None else None
    except OSError as error:  # there is no descriptor left to look with
        raise HostError(f"kick fd of queue {index}: {error.strerror}", errno=error.errno or 0) from error


@contextmanager
def _refusals() -> Iterator[None]:
    """What a queue does not take was the peer's."""
    try:
        yield
    except HostError as error:
        raise PeerError(str(error), final=isinstance(error, KeptFullError)) from error
