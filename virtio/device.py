"""What a device is: its class attributes say what it offers, its methods do the work.

A native device is driven by C workers and only describes itself here. Any other device is Python: its queues are
pumped by trio tasks that call ``handle``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import trio
from pydantic import BaseModel, ConfigDict

from virtio.capabilities import DiskStorage, NetworkPort
from virtio.claims import Claims
from virtio.native.chain import Chain
from virtio.native.disk import NativeDevice
from virtio.native.pump import Queue

__all__ = ["Chain", "Device", "DeviceOptions", "Queue"]


DESCRIPTORS_MIN: Final = 32
"""Descriptors that each device may have of its own, however few the process has."""

START_SECONDS: Final = 5.0
"""How long a device's ``run`` may take until it reports that it started, where its class does not say."""


class DeviceOptions(BaseModel):
    """Base of a device type's own options in the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def claims(self, name: str) -> Claims:
        """What the device called ``name`` claims of the host and of others; asked while a configuration is checked."""
        return Claims()

    def faults_in_files(self, folder: Path) -> Iterable[tuple[str, str]]:
        """(option, what is wrong) of files that belong to the configuration, whose folder is ``folder``."""
        return ()

    @property
    def descriptors_max(self) -> int:
        """The most file descriptors that such a device has of its own, beside its queues' and its front-end's."""
        return DESCRIPTORS_MIN


class Device:
    """One virtio device.

    The daemon and the backend call the methods on the event loop, one call at a time, unless a method says otherwise:
    "thread" means a thread in which nothing of trio may be used. docs/device-contract.md has the order of the calls.

    Class attributes: ``virtio_id`` (section 5), ``features`` (the names and bits it offers of its own; ring features
    are added by the backend), ``queue_counts`` (least, most), ``ops`` (names of its operations, for the metrics),
    ``Options`` (its configuration), ``request_max`` (a chain holds at most so many bytes to read, and has room for at
    most so many: a longer one breaks the queue before the device sees it), ``answers_in_order`` (each queue's requests
    are answered in the order in which they came), ``start_seconds`` (how long ``run`` may take until it reports that it
    started). ``native`` devices set ``native_device``.
    """

    virtio_id: ClassVar[int]
    type_name: ClassVar[str]
    native: ClassVar[bool] = False
    feature_bits: ClassVar[Mapping[str, int]] = {}
    queue_counts: ClassVar[tuple[int, int]] = (1, 1)
    default_queues: ClassVar[int] = 1
    queue_size_limit: ClassVar[int] = 32768
    ops: ClassVar[tuple[str, ...]] = ("request",)
    Options: ClassVar[type[DeviceOptions]] = DeviceOptions
    request_max: ClassVar[int] = 1 << 20
    answers_in_order: ClassVar[bool] = False
    start_seconds: ClassVar[float] = START_SECONDS
    files_may_hang: ClassVar[bool] = False

    def __init__(self, name: str, options: Any, queues: int, queue_size: int) -> None:
        """Once, by the daemon, beside nothing of this device; with ``files_may_hang`` in a thread.

        ``options`` is an instance of ``Options``. ``HostError``: something it needs cannot be had.
        """
        self.name = name
        self.options = options
        self.queue_count = queues
        self.queue_size = queue_size
        self.driver_features = 0
        self.config_changed: Callable[[], None] = lambda: None
        """Set by the backend. Call it after ``config_space`` changed, so that the driver is told."""
        self.ring_sizes: dict[int, int] = {}
        """The size of each queue that the driver has set up since its reset; kept by the backend."""

    @property
    def promised_chain(self) -> int:
        """Descriptors of the longest chain that the config space, as the driver last read it, lets a driver make.

        When a queue is set up, by the backend, before the queue runs.
        """
        return 0

    @classmethod
    def virtqueues(cls, options: Any, queues: int) -> int:
        """How many virtqueues there are, the control queue among them, where the configuration says ``queues``.

        When the configuration is read or checked, by the loader; there may be no device.
        """
        return queues

    @property
    def native_device(self) -> NativeDevice:
        """The C device of a native one. Any time until ``close``, by the backend."""
        raise TypeError(f"{self.type_name} is not a native device")

    def worker_of(self, queue_index: int, workers: int) -> int:
        """Of a native device: which of its workers drives the queue. Once for each queue, by the backend, before any
        queue runs."""
        return queue_index % workers

    def features(self) -> int:
        """The feature bits this instance offers, as a mask. Whenever a front-end asks, by the backend, beside running
        queues."""
        return sum(1 << bit for bit in self.feature_bits.values())

    def set_driver_features(self, bits: int) -> None:
        """The driver accepted these. At negotiation, by the backend, beside queues that run, because front-ends repeat
        themselves; with 0 at a reset, when all queues have stopped."""
        self.driver_features = bits

    def config_space(self) -> bytes:
        """The device-specific configuration as the driver reads it (zeroes follow). At any time, by the backend, beside
        running queues."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to the config space; most fields are read-only, and writes to those are ignored (2.5).
        At any time, by the backend, beside running queues."""

    @property
    def port(self) -> NetworkPort | None:
        """What a network interface has beside this. At any time, by anybody; any thread."""
        return None

    @property
    def disk(self) -> DiskStorage | None:
        """What a disk has beside this. At any time, by anybody; any thread."""
        return None

    def limit_descriptors(self, count: int) -> None:
        """The device may have so many descriptors of its own, as ``descriptors_max`` counts them. Once, by the daemon,
        before ``run``.

        For a device that opens them for guests or peers, as many as these like; at least ``DESCRIPTORS_MIN``.
        """

    def use_workers(self, count: int) -> None:
        """Of a native device: so many workers drive it. Once, by the backend, before its first queue runs.
        ``HostError``.

        With ``files_may_hang`` the daemon has called it before, in the thread that opens the device; the second call
        then changes nothing.
        """

    def examine(self) -> None:
        """Look at files, which may hang. At SIGHUP, by the daemon, in a thread, beside everything else.
        ``HostError``."""

    def refresh(self) -> bool:
        """Take over what ``examine`` found; True when something changed. At SIGHUP, by the daemon, after ``examine``,
        beside running queues."""
        return False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """What the device does beside its queues. Once, by the backend, as a task of its own, from before the first
        queue runs until after the last one has stopped; then it is cancelled."""
        task_status.started()

    async def run_queue(self, queue: Queue) -> None:
        """Drive one queue: the default hands each chain to ``handle``. Whenever a queue starts, by the backend, as a
        task beside ``run`` and the other queues' tasks; cancelled when the queue stops."""
        await queue.serve(self.handle)

    async def handle(self, queue: Queue, chain: Chain) -> None:
        """Serve one chain. For each chain, by ``run_queue``, one after the other in a queue, beside other queues and
        what was spawned. ``GuestError`` breaks the queue, as does any other exception (the device's mistake)."""
        raise TypeError(f"{self.type_name} has no handle()")

    def queue_running(self, queue_index: int, running: bool) -> None:
        """A queue has started, or has stopped. By the backend, beside the other queues."""

    async def queue_stopping(self, queue: Queue) -> None:
        """Give back the chains that were taken from this queue. When ``run_queue`` was cancelled, by the backend,
        beside ``run`` and the other queues; it may take 5 seconds."""

    def reset(self) -> None:
        """The driver, or the front-end, starts over. By the backend, when all queues have stopped, beside ``run``."""

    def close(self) -> None:
        """Give back what the device holds (files, sockets). Once, by the daemon, when ``run`` has ended, beside
        nothing; with ``files_may_hang`` in a thread."""
