"""A driver of the virtio-mmio register file, by the order of 3.1.1 and nothing of the project's own tables.

``Performer`` stands for the thin part that carries out operations: it writes them down and reports each as done,
or, held, leaves them under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from virtio.mmio.register_file import RegisterFile
from virtio.mmio.registers import EnableQueue, Operation, Reset, SetDriverFeatures, StartQueue, StopQueue

MAGIC: Final = 0x000
VERSION: Final = 0x004
DEVICE_ID: Final = 0x008
VENDOR_ID: Final = 0x00C
DEVICE_FEATURES: Final = 0x010
DEVICE_FEATURES_SEL: Final = 0x014
DRIVER_FEATURES: Final = 0x020
DRIVER_FEATURES_SEL: Final = 0x024
QUEUE_SEL: Final = 0x030
QUEUE_NUM_MAX: Final = 0x034
QUEUE_NUM: Final = 0x038
QUEUE_READY: Final = 0x044
QUEUE_NOTIFY: Final = 0x050
INTERRUPT_STATUS: Final = 0x060
INTERRUPT_ACK: Final = 0x064
STATUS: Final = 0x070
AREAS: Final = (0x080, 0x090, 0x0A0)
SHM_SEL: Final = 0x0AC
SHM_LEN: Final = (0x0B0, 0x0B4)
QUEUE_RESET: Final = 0x0C0
KEY: Final = 0x0F0
BELL: Final = 0x0F4
GENERATION: Final = 0x0FC
CONFIG: Final = 0x100

ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64
FAILED: Final = 128

F_ACCESS_PLATFORM: Final = 1 << 33
F_VERSION_1: Final = 1 << 32
F_RING_PACKED: Final = 1 << 34
F_NOTIFICATION_DATA: Final = 1 << 38
F_RING_RESET: Final = 1 << 40
F_HYPERCALL_NOTIFY: Final = 1 << 44


class Performer:
    """A register file with somebody who does what it asks. ``done`` lists it; ``held`` leaves it under way."""

    def __init__(self, registers: RegisterFile) -> None:
        self.registers = registers
        self.done: list[Operation] = []
        self.held = False
        self.under_way: list[Operation] = []
        self.fails: type | None = None
        self.running: set[int] = set()
        self.started: set[int] = set()

    def read(self, offset: int, size: int = 4) -> int:
        return self.registers.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> list[Operation]:
        operations = list(self.registers.write(offset, size, value))
        self.perform(operations)
        return operations

    def perform(self, operations: Sequence[Operation]) -> None:
        self.under_way += operations
        if not self.held:
            self.finish()

    def finish(self) -> None:
        """Carry out what is under way."""
        while self.under_way:
            operation = self.under_way.pop(0)
            if self.fails is not None and isinstance(operation, self.fails):
                self.registers.failed(operation)
                self.under_way.clear()
                return
            self._check(operation)
            self.done.append(operation)
            self.registers.finished(operation)

    def _check(self, operation: Operation) -> None:
        """What the waist may rely on."""
        match operation:
            case StartQueue(index=index):
                assert index not in self.started
                self.started.add(index)
            case EnableQueue(index=index):
                assert index in self.started
                self.running.add(index)
            case StopQueue(index=index):
                assert index in self.started
                self.started.discard(index)
                self.running.discard(index)
            case SetDriverFeatures():
                assert not self.started
            case Reset():
                self.started.clear()
                self.running.clear()

    # ---- an honest driver ----

    def features(self) -> int:
        words = []
        for word in (0, 1):
            self.write(DEVICE_FEATURES_SEL, word)
            words.append(self.read(DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def negotiate(self, features: int) -> bool:
        """3.1.1, steps 1 to 6: whether the device took them."""
        self.write(STATUS, 0)
        return self.choose(features)

    def choose(self, features: int) -> bool:
        """The same, of a device that was just reset."""
        self.write(STATUS, ACKNOWLEDGE)
        self.write(STATUS, ACKNOWLEDGE | DRIVER)
        for word in (0, 1):
            self.write(DRIVER_FEATURES_SEL, word)
            self.write(DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.read(STATUS) & FEATURES_OK)

    def set_up(self, index: int, size: int, areas: tuple[int, int, int]) -> list[Operation]:
        """4.2.3.2, up to QueueReady."""
        self.write(QUEUE_SEL, index)
        assert self.read(QUEUE_READY) == 0
        assert size <= self.read(QUEUE_NUM_MAX)
        self.write(QUEUE_NUM, size)
        for register, address in zip(AREAS, areas, strict=True):
            self.write(register, address & 0xFFFF_FFFF)
            self.write(register + 4, address >> 32)
        return self.write(QUEUE_READY, 1)

    def driver_ok(self) -> list[Operation]:
        return self.write(STATUS, self.read(STATUS) | DRIVER_OK)

    def start(self, features: int = F_VERSION_1, queues: int = 1) -> None:
        """All of 3.1.1."""
        assert self.negotiate(features)
        for index in range(queues):
            self.set_up(index, 8, (0x1000 + index * 0x3000, 0x2000 + index * 0x3000, 0x3000 + index * 0x3000))
        self.driver_ok()
