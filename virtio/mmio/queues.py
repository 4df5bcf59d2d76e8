"""What a driver has told a virtio-mmio device so far: status, features, and the queues behind QueueSel.

``RegisterFile`` (``virtio.mmio.register_file``) is the whole; this is the part of it that a reset forgets.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from virtio import spec
from virtio.mmio.registers import EnableQueue, Notify, Operation, Reason, Refusals, StartQueue, StopQueue
from virtio.waist import PACKED_BASE_INITIAL, AddressSpace, QueueSetup

VIRTIO_F_HYPERCALL_NOTIFY: Final = 1 << 44
"""Ours, in a range that the specification reserves (section 6): see ``transports.hypercall``."""

WORD: Final = 0xFFFF_FFFF


class State(enum.Enum):
    """A queue's; STARTING and STOPPING while the operation is under way."""

    IDLE = enum.auto()
    STARTING = enum.auto()
    READY = enum.auto()
    STOPPING = enum.auto()


_LIVE: Final = (State.STARTING, State.READY)


@dataclass(slots=True)
class Queue:
    """One queue as the driver set it up."""

    state: State = State.IDLE
    size: int = 0
    desc: int = 0
    driver: int = 0
    device: int = 0
    resetting: bool = False
    bell_accepted: bool = False


_NO_QUEUE: Final = Queue()
"""What registers read for a queue that does not exist: 0 everywhere (4.2.2)."""


@dataclass(frozen=True, slots=True)
class Bells:
    """The hypercall doorbell as the device offers it: the VM's key, and the bell of each queue (0: it has none)."""

    key: int
    numbers: tuple[int, ...]


@dataclass(slots=True)
class Driver:
    """Status and features."""

    status: int = 0
    features: int = 0
    features_beyond: bool = False  # it accepted a bit above 63, where there is none
    hypercall_offered: bool = False  # since the last reset, if not any more
    device_features_sel: int = 0
    driver_features_sel: int = 0

    @property
    def features_ok(self) -> bool:
        return bool(self.status & spec.VIRTIO_CONFIG_S_FEATURES_OK)

    @property
    def ok(self) -> bool:
        """DRIVER_OK: before it a device neither consumes buffers nor interrupts (2.1.2)."""
        return bool(self.status & spec.VIRTIO_CONFIG_S_DRIVER_OK)

    def negotiated(self, mask: int) -> bool:
        return self.features_ok and bool(self.features & mask)


@dataclass(slots=True)
class QueueRegisters:
    """The registers that act on the selected queue."""

    count: int
    size_max: int
    refusals: Refusals
    bells: Bells | None = None
    driver: Driver = field(default_factory=Driver)
    selector: int = 0
    queues: list[Queue] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As after power-on."""
        self.driver = Driver(hypercall_offered=self.bells is not None)
        self.selector = 0
        self.queues = [Queue() for _ in range(self.count)]

    @property
    def exists(self) -> bool:
        return self.selector < self.count

    @property
    def selected(self) -> Queue:
        return self.queues[self.selector] if self.exists else _NO_QUEUE

    @property
    def live(self) -> tuple[int, ...]:
        """The queues that are ready, or are once the operations asked for before are done."""
        return tuple(index for index, queue in enumerate(self.queues) if queue.state in _LIVE)

    # ---- setup ----

    def select(self, value: int) -> Sequence[Operation]:
        self.selector = value
        if not self.exists:
            self.refusals.add("QueueSel", Reason.NO_QUEUE)
        return []

    def _settable(self, name: str) -> Queue | None:
        """The selected queue, if its setup may be changed: 4.2.2.2, only while QueueReady is 0."""
        if not self.exists:
            self.refusals.add(name, Reason.NO_QUEUE)
        elif self.selected.state != State.IDLE:
            self.refusals.add(name, Reason.QUEUE_IN_USE)
        else:
            return self.selected
        return None

    def set_size(self, value: int) -> Sequence[Operation]:
        queue = self._settable("QueueNum")
        if queue is not None:
            queue.size = value
        return []

    def set_area(self, name: str, area: str, shift: int, value: int) -> Sequence[Operation]:
        """One half of the address of ``area``, a field of ``Queue``."""
        queue = self._settable(name)
        if queue is not None:
            setattr(queue, area, getattr(queue, area) & ~(WORD << shift) | value << shift)
        return []

    # ---- start and stop ----

    def set_ready(self, value: int) -> Sequence[Operation]:
        queue = self.selected
        if not self.exists:
            self.refusals.add("QueueReady", Reason.NO_QUEUE)
        elif value > 1:
            self.refusals.add("QueueReady", Reason.VALUE)
        elif value == 0:
            return self._stop("QueueReady") if queue.state != State.IDLE else []
        elif queue.state != State.IDLE:
            self.refusals.add("QueueReady", Reason.QUEUE_IN_USE)
        elif not self.driver.features_ok:
            self.refusals.add("QueueReady", Reason.ORDER)
        elif not 0 < queue.size <= self.size_max:
            self.refusals.add("QueueReady", Reason.VALUE, f"QueueNum {queue.size} is not 1 to {self.size_max}")
        else:
            return self._start(queue, self.selector)
        return []

    def _start(self, queue: Queue, index: int) -> Sequence[Operation]:
        queue.state = State.STARTING
        base = PACKED_BASE_INITIAL if self.driver.negotiated(1 << spec.VIRTIO_F_RING_PACKED) else 0
        setup = QueueSetup(queue.size, queue.desc, queue.driver, queue.device, base, AddressSpace.GPA)
        operations: list[Operation] = [StartQueue(index, setup)]
        if self.driver.ok:  # set up late: otherwise DRIVER_OK enables it
            operations.append(EnableQueue(index))
        return operations

    def _stop(self, name: str) -> Sequence[Operation]:
        queue = self.selected
        if queue.state != State.READY:
            self.refusals.add(name, Reason.QUEUE_IN_USE)
            return []
        queue.state = State.STOPPING
        return [StopQueue(self.selector)]

    def reset_queue(self, value: int) -> Sequence[Operation]:
        """2.6.1: one queue starts over, with VIRTIO_F_RING_RESET."""
        if not self.driver.negotiated(1 << spec.VIRTIO_F_RING_RESET):
            self.refusals.add("QueueReset", Reason.ORDER)
        elif not self.exists:
            self.refusals.add("QueueReset", Reason.NO_QUEUE)
        elif value != 1:
            self.refusals.add("QueueReset", Reason.VALUE)
        elif self.selected.state != State.READY:
            self.refusals.add("QueueReset", Reason.QUEUE_NOT_READY)
        else:
            self.selected.resetting = True
            return self._stop("QueueReset")
        return []

    def stopped(self, index: int) -> None:
        """Its setup is forgotten: a driver that uses it again writes size and areas anew (3.1.1 step 7, 2.6.1)."""
        self.queues[index] = Queue(bell_accepted=self.queues[index].bell_accepted)

    # ---- doorbells ----

    def offer_bells(self, bells: Bells) -> None:
        self.bells = bells
        self.driver.hypercall_offered = True

    def notify(self, value: int) -> Sequence[Operation]:
        if value < self.count:
            return [Notify(value)]
        self.refusals.add("QueueNotify", Reason.NO_QUEUE)
        return []

    def bell(self, index: int) -> int:
        """The bell of a queue; 0: withheld."""
        return self.bells.numbers[index] if self.bells is not None and index < self.count else 0

    @property
    def bells_accepted(self) -> tuple[int, ...]:
        """The queues whose driver said that it may ring by hypercall, by the feature or one by one."""
        all_of_them = self.driver.negotiated(VIRTIO_F_HYPERCALL_NOTIFY)
        return tuple(index for index, queue in enumerate(self.queues) if all_of_them or queue.bell_accepted)

    def accept_bell(self, value: int) -> Sequence[Operation]:
        if not self.exists:
            self.refusals.add("HypercallBell", Reason.NO_QUEUE)
        elif not self.bell(self.selector):
            self.refusals.add("HypercallBell", Reason.WITHHELD)
        elif value != 1:
            self.refusals.add("HypercallBell", Reason.VALUE)
        else:
            self.selected.bell_accepted = True
        return []
