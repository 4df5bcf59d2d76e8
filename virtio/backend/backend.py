"""THE WAIST: one device as one driver sees it.

A transport calls the verbs below (see ``transports.base.BackendLike``) and knows nothing else; a device never hears
of a transport. The state of each queue is in ``virtio.backend.queue``.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType

import structlog
import trio

from virtio import spec
from virtio.backend.device_calls import DeviceCalls
from virtio.backend.drivers import PumpedQueue, QueueDriver, WorkerQueue
from virtio.backend.events import Events
from virtio.backend.memory_files import MemoryFiles
from virtio.backend.new_driver import DriverWatch
from virtio.backend.queue import BackendQueue, number_of
from virtio.capabilities import NetworkPort
from virtio.device import Device
from virtio.errors import HostError, PeerError
from virtio.fd import OwnedFd, take_count
from virtio.native.interrupt import InterruptStatus
from virtio.native.memory import Iotlb, MemoryTable, install_sigbus_guard
from virtio.native.stats import BackendStats
from virtio.native.virtqueue import Virtqueue
from virtio.native.worker import Worker
from virtio.waist import ConfigChanged, Doorbell, Event, MemoryRegion, QueueBroken, QueueSetup

log = structlog.get_logger()


class Backend:
    """``async with Backend(device, ...) as backend``: the verbs work inside the block; at its end all is stopped.

    ``workers``: for native devices, the workers its queues are spread over (queue i goes to worker i mod n).
    ``features_off``: bit numbers the operator turned off. ``queue_size_max``: the largest ring accepted.
    ``remote_memory``: guest memory may be files of FUSE, NFS and the like.
    """

    def __init__(
        self,
        device: Device,
        *,
        workers: Sequence[Worker] = (),
        queue_size_max: int = spec.VIRTQUEUE_SIZE_MAX,
        features_off: Collection[int] = (),
        remote_memory: bool = False,
    ) -> None:
        if device.native and not workers:
            raise ValueError(f"{device.name}: a native device needs a worker")
        self._device = device
        self._calls = DeviceCalls(device)
        self._workers = tuple(workers)
        self._queue_size_max = min(queue_size_max, device.queue_size_limit)
        self._features_off = sum(1 << bit for bit in set(features_off))
        self._driver_features = 0
        self._status = 0
        self._table = MemoryTable()
        self._memory_files = MemoryFiles(allow_remote=remote_memory)
        self._iotlb = Iotlb()
        self._queues: list[BackendQueue] = []
        self._drivers = DriverWatch(self._queues)
        self._events = Events()
        self._stack = AsyncExitStack()
        self._log = log.bind(device=device.name)
        self.kick_observer: Callable[[int, int | None], None] = lambda index, eventfd: None
        """Told (queue index, ``eventfd_id``) whenever a queue gets a kick fd, (queue index, None) when it loses it."""

    # ---- life ----

    async def __aenter__(self) -> Backend:
        await self._stack.enter_async_context(self._living())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _living(self) -> AsyncIterator[None]:
        install_sigbus_guard()
        self._device.use_workers(len(set(self._workers)))
        with OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as event_fd:
            async with trio.open_nursery() as nursery:
                for index in range(self._device.queue_count):
                    vq = Virtqueue(index, event_fd.fileno())
                    driver: QueueDriver
                    if self._device.native:
                        worker = self._workers[self._device.worker_of(index, len(self._workers))]
                        driver = WorkerQueue(vq, worker, self._device.native_device)
                    else:
                        driver = PumpedQueue(vq, self._device, self._calls, nursery)
                    self._queues.append(BackendQueue(vq, driver, self._device, self._calls))
                self._device.config_changed = self._config_changed
                nursery.start_soon(self._watch, event_fd.fileno())
                with trio.move_on_after(self._device.start_seconds) as starting:
                    await nursery.start(self._run_device)
                if starting.cancelled_caught:
                    limit = self._device.start_seconds
                    raise HostError(
                        f"the device's run() has not reported for {limit:g} seconds that it started; "
                        "it must call task_status.started(), or its class say start_seconds"
                    )
                try:
                    yield
                finally:
                    with trio.CancelScope(shield=True):
                        await self.reset()
                    self._device.config_changed = lambda: None
                    nursery.cancel_scope.cancel()
            for queue in self._queues:
                queue.take_fds()

    async def _run_device(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if not await self._calls.run(task_status):
            self._give_up()

    def _give_up(self) -> None:
        """The device made a mistake outside its queues: all of them stop until there is a reset."""
        for queue in self._queues:
            queue.give_up()

    async def _watch(self, event_fd: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(event_fd)
            take_count(event_fd)  # whatever woke this task, it looks
            for queue in self._queues:
                self._look(queue)

    def _look(self, queue: BackendQueue) -> None:
        report = queue.vq.report()
        if report.moved is not None and not queue.moved_told:
            queue.moved_told = True
            self._log.warning(
                "the front-end's base is not where the ring stands: its used index counts",
                queue=queue.vq.index,
                base=report.moved.base,
                used=report.moved.used,
            )
        if report.error is not None and not queue.broken:
            queue.broken = True
            self._status |= spec.VIRTIO_CONFIG_S_NEEDS_RESET
            self._events.add(QueueBroken(queue.vq.index, report.error))
        queue.look_at_call(report.call_error)
        if report.miss is not None and report.miss_number != queue.miss_told:
            queue.miss_told = report.miss_number
            self._events.add(report.miss)

    def _config_changed(self) -> None:
        self._events.add(ConfigChanged())

    # ---- what is fixed, features, config space, status ----

    @property
    def name(self) -> str:
        return self._device.name

    @property
    def device_id(self) -> int:
        """The device's type by its number in the specification (section 5)."""
        return self._device.virtio_id

    @property
    def queue_count(self) -> int:
        return self._device.queue_count

    @property
    def queue_size_max(self) -> int:
        return self._queue_size_max

    @property
    def status(self) -> int:
        """The device status field (section 2.1); DEVICE_NEEDS_RESET shows here once a queue is broken."""
        return self._status

    def set_status(self, status: int) -> None:
        # 2.1.2: the need for a reset stays until there is one, and that is status 0.
        self._status = status | (self._status & spec.VIRTIO_CONFIG_S_NEEDS_RESET) if status else 0

    def device_features(self) -> int:
        ring = sum(1 << bit for bit in spec.RING_FEATURES.values())
        return self._calls.ask("features", lambda: ring | self._device.features()) & ~self._features_off

    def set_driver_features(self, bits: int) -> None:
        unknown = bits & ~self.device_features()
        if unknown:
            raise PeerError(f"features {unknown:#x} were not offered")
        self._calls.ask("set_driver_features", lambda: self._device.set_driver_features(bits))
        self._driver_features = bits
        self._drivers.negotiated()

    @property
    def has_config_space(self) -> bool:
        return bool(self._config_space())

    def read_config(self, offset: int, size: int) -> bytes:
        _check_config_range(offset, size)
        space = self._config_space()
        return space[offset : offset + size].ljust(size, b"\0")

    def _config_space(self) -> bytes:
        return self._calls.ask("config_space", lambda: bytes(self._device.config_space()))

    def write_config(self, offset: int, data: bytes) -> None:
        _check_config_range(offset, len(data))
        if not self._calls.go_on("write_config", lambda: self._device.write_config(offset, data)):
            self._give_up()

    # ---- what only network interfaces have ----

    def set_mtu(self, mtu: int) -> None:
        """``PeerError``: the device cannot have it."""
        self._calls.ask("set_mtu", lambda: self._port().set_mtu(mtu))

    async def announce(self, address: bytes) -> None:
        """The guest has moved here: its network is told that ``address``, of 6 bytes, is on this port now."""
        self._calls.ask("prepare_announcement", lambda: self._port().prepare_announcement(address))
        await self._nudge(0)

    def _port(self) -> NetworkPort:
        port = self._device.port
        if port is None:
            raise PeerError(f"a {self._device.type_name} device is no network interface")
        return port

    async def _nudge(self, index: int) -> None:
        """The worker of that queue has seen what the device was told."""
        worker = self._workers[self._device.worker_of(index, len(self._workers))]
        await worker.nudge(self._device.native_device)

    # ---- memory ----

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """The whole new table. On ``HostError`` the old one stays and the fds of new regions are closed."""
        try:
            await self._memory_files.check([region for region in regions if region not in self._table.mappings])
            before = self._table
            after = MemoryTable(regions, before)
        except BaseException:
            for region in regions:
                if region not in self._table.mappings:
                    region.fd.close()
            raise
        self._table = after
        async with trio.open_nursery() as nursery:
            for queue in self._queues:
                nursery.start_soon(queue.set_memory, after)
        before.close_dropped(after)

    async def iotlb_update(self, iova: int, size: int, uva: int, perm: int) -> None:
        try:
            self._iotlb.update(iova, size, uva, perm)
        except HostError as error:
            raise PeerError(str(error)) from error
        for queue in self._queues:
            # A miss that is not visible yet is about to become an event, and asked for once more.
            miss = queue.vq.report().miss
            if miss is not None and iova <= miss.iova < iova + size and miss.perm & perm == miss.perm:
                await queue.resume()

    async def iotlb_invalidate(self, iova: int, size: int) -> None:
        self._iotlb.invalidate(iova, size)

    # ---- queues ----

    def _queue(self, index: int) -> BackendQueue:
        if not 0 <= index < len(self._queues):
            raise PeerError(f"queue {index} does not exist, the device has {len(self._queues)}")
        return self._queues[index]

    async def configure_queue(self, index: int, setup: QueueSetup) -> None:
        """Only while the queue is stopped or suspended. It runs at once if it is started and enabled.

        ``PeerError``: an impossible size or base; ``GuestError``: misaligned.
        """
        queue = self._queue(index)
        if queue.setup is not None and queue.started:
            raise PeerError(f"queue {index} is set up while it is started")
        if not 0 < setup.size <= self._queue_size_max:
            raise PeerError(f"queue {index} of size {setup.size}, allowed are 1 to {self._queue_size_max}")
        queue.setup = None  # also if it fails
        queue.vq.configure(
            setup, self._driver_features, self._table, self._iotlb, in_order=self._device.answers_in_order
        )
        queue.setup = setup
        queue.note_size(setup.size, self._driver_features)
        queue.broken = queue.moved_told = False
        if not self._device.native and self._drivers.begins_anew(queue):
            await self._begin_anew()
        await queue.run_if_due()

    async def _begin_anew(self) -> None:
        """The guest has another driver, though there was no reset (``virtio.backend.new_driver``): now there is one."""
        self._log.info("another driver begins: the device is reset")
        running = [queue for queue in self._queues if queue.running]
        for queue in running:
            await queue.halt()
        self._calls.reset()
        if not self._calls.go_on(
            "set_driver_features", lambda: self._device.set_driver_features(self._driver_features)
        ):
            self._give_up()
        for queue in running:
            await queue.run_if_due()

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        """Start the queue, or have it start when it is set up; its ring is then looked at once. None: it is polled."""
        try:
            queue = self._queue(index)
            queue.check_kick(fd)
            await queue.halt()
            number = number_of(index, fd)  # now: once it is given away, the fd is the queue's alone
        except BaseException:
            if fd is not None:
                fd.close()
            raise
        queue.give_kick(fd)
        queue.started = True
        self.kick_observer(index, number)
        await queue.run_if_due()

    async def set_doorbell(self, index: int, kind: Doorbell, fd: OwnedFd | None) -> None:
        """A further eventfd that rings the queue beside its kick fd, at any time; gone again when the queue stops.

        None takes it away: when this returns nobody looks at it any more, and it is closed. The queue goes on
        meanwhile, so a network device loses no frame. The ring is looked at once after either, so whoever withdraws a
        doorbell need only see that it is not rung in vain from then on.
        """
        try:
            if kind == Doorbell.KICK:
                raise ValueError("the kick fd starts the queue: set_kick")
            queue = self._queue(index)
        except BaseException:
            if fd is not None:
                fd.close()
            raise
        await queue.set_doorbell(kind, fd)

    def set_interrupt_status(self, status: InterruptStatus | None) -> None:
        """virtio-mmio: the word whose bit 0 every queue sets before it signals its call fd. While all are stopped."""
        for queue in self._queues:
            queue.vq.set_interrupt_status(status)

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        await self._queue_or_close(index, fd).set_call(fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        await self._queue_or_close(index, fd).set_err(fd)

    def _queue_or_close(self, index: int, fd: OwnedFd | None) -> BackendQueue:
        try:
            return self._queue(index)
        except PeerError:
            if fd is not None:
                fd.close()
            raise

    async def enable_queue(self, index: int, on: bool) -> None:
        queue = self._queue(index)
        queue.enabled = on
        if on:
            queue.unmute()
            await queue.run_if_due()
        elif queue.running and queue.mute():
            await self._nudge(index)  # so nothing has an effect any more when this returns
        else:
            await self._halt(queue)

    async def suspend_queue(self, index: int) -> int:
        """Stop and drain until it is set up again; where the ring stands. It stays started and keeps its fds."""
        queue = self._queue(index)
        await self._halt(queue)
        queue.setup = None
        return queue.vq.base

    async def stop_queue(self, index: int) -> int:
        """Stop and drain; where the ring stands. Nothing of the queue touches guest memory after this."""
        queue = self._queue(index)
        await self._halt(queue)
        queue.started = False
        queue.setup = None
        queue.vq.clear_doorbells()
        queue.vq.set_call(None)
        self.kick_observer(index, None)
        return queue.vq.base

    async def _halt(self, queue: BackendQueue) -> None:
        ran = queue.running
        await queue.halt()
        self._drivers.stopped(queue, ran=ran)

    async def reset(self, *, keep_memory: bool = False) -> None:
        """Stop all queues and forget features, memory and addresses: as after power-on.

        ``keep_memory``: the driver alone is reset; the memory belongs to the connection with its front-end.
        """
        for queue in self._queues:
            await queue.halt()
            queue.started = queue.enabled = queue.broken = False
            queue.setup = None
            queue.take_fds()
            self.kick_observer(queue.vq.index, None)
            queue.vq.forget()
        self._iotlb.clear()
        if not keep_memory:
            before, self._table = self._table, MemoryTable()
            before.close_dropped(self._table)
        self._driver_features = self._status = 0
        self._device.ring_sizes.clear()
        self._drivers.forget()
        self._calls.reset()
        self._events.clear()  # of what is no more

    # ---- events and counters ----

    async def next_event(self) -> Event:
        """Wait for what the transport has to pass on."""
        return await self._events.next()

    def in_flight(self) -> list[tuple[int, int, float]]:
        """Of each queue that waits for something: its number, how many requests, and the oldest one's age in seconds.

        May be called while the backend ends.
        """
        now = time.monotonic_ns()
        stats = [queue.vq.stats((), queue.running, now) for queue in self._queues]
        return [(each.queue, each.inflight, each.oldest_age_seconds) for each in stats if each.inflight]

    def stats(self) -> BackendStats:
        """The counters now; may be called from any thread."""
        now = time.monotonic_ns()
        port, disk = self._device.port, self._device.disk
        return BackendStats(
            device=self._device.name,
            type=self._device.type_name,
            driver_features=self._driver_features,
            queues=tuple(q.vq.stats(self._device.ops, q.running, now) for q in self._queues),
            lost=self._calls.look("lost", lambda: port.lost() if port is not None else (), ()),
            link_up=self._calls.look("link_up", lambda: port.link_up if port is not None else None, None),
            storage=self._calls.look("storage", lambda: disk.storage() if disk is not None else None, None),
        )


def _check_config_range(offset: int, size: int) -> None:
    if offset < 0 or size < 0 or offset + size > spec.CONFIG_SPACE_MAX:
        raise PeerError(f"config space {offset}+{size} is beyond its {spec.CONFIG_SPACE_MAX} bytes")
