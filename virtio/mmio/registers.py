"""The registers of virtio-mmio as a table (virtio 1.3, 4.2.2), and what a write to one may ask to be done.

The table is the only place that knows which registers there are; ``virtio.mmio.register_file`` serves by it.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from virtio.waist import QueueSetup


class Access(enum.Flag):
    """What a driver may do with a register."""

    R = enum.auto()
    W = enum.auto()
    RW = R | W


class Server(enum.Enum):
    """Who serves a register in our own virtual machine.

    The vCPU thread serves what lies on the way of every request; it hands over all else, and what is malformed.
    """

    PYTHON = enum.auto()
    VCPU = enum.auto()


@dataclass(frozen=True, slots=True)
class Register:
    """Four bytes at ``offset``, accessed only as a whole (4.2.2.2)."""

    offset: int
    name: str
    access: Access
    server: Server = Server.PYTHON


REGISTERS: Final = (
    Register(0x000, "MagicValue", Access.R),
    Register(0x004, "Version", Access.R),
    Register(0x008, "DeviceID", Access.R),
    Register(0x00C, "VendorID", Access.R),
    Register(0x010, "DeviceFeatures", Access.R),
    Register(0x014, "DeviceFeaturesSel", Access.W),
    Register(0x020, "DriverFeatures", Access.W),
    Register(0x024, "DriverFeaturesSel", Access.W),
    Register(0x030, "QueueSel", Access.W),
    Register(0x034, "QueueNumMax", Access.R),
    Register(0x038, "QueueNum", Access.W),
    Register(0x044, "QueueReady", Access.RW),
    Register(0x050, "QueueNotify", Access.W, Server.VCPU),
    Register(0x060, "InterruptStatus", Access.R, Server.VCPU),
    Register(0x064, "InterruptACK", Access.W, Server.VCPU),
    Register(0x070, "Status", Access.RW),
    Register(0x080, "QueueDescLow", Access.W),
    Register(0x084, "QueueDescHigh", Access.W),
    Register(0x090, "QueueDriverLow", Access.W),
    Register(0x094, "QueueDriverHigh", Access.W),
    Register(0x0A0, "QueueDeviceLow", Access.W),
    Register(0x0A4, "QueueDeviceHigh", Access.W),
    Register(0x0AC, "SHMSel", Access.W),
    Register(0x0B0, "SHMLenLow", Access.R),
    Register(0x0B4, "SHMLenHigh", Access.R),
    Register(0x0B8, "SHMBaseLow", Access.R),
    Register(0x0BC, "SHMBaseHigh", Access.R),
    Register(0x0C0, "QueueReset", Access.RW),
    # Ours, not the specification's: the device key and the bells of the hypercall doorbell.
    Register(0x0F0, "HypercallKey", Access.R),
    Register(0x0F4, "HypercallBell", Access.RW),
    Register(0x0FC, "ConfigGeneration", Access.R),
)

BY_OFFSET: Final[Mapping[int, Register]] = {register.offset: register for register in REGISTERS}
OFFSETS: Final[Mapping[str, int]] = {register.name: register.offset for register in REGISTERS}

CONFIG_OFFSET: Final = 0x100
CONFIG_NAME: Final = "Config"
UNKNOWN_NAME: Final = "Unknown"
WINDOW_SIZE: Final = 0x200
"""The registers and 256 bytes of config space."""

MAGIC: Final = 0x74726976  # "virt"
VERSION: Final = 2
VENDOR: Final = int.from_bytes(b"HyBl", "little")


class Reason(enum.Enum):
    """Why an access did nothing. A read that is refused gives 0."""

    SIZE = "wrong size"
    ALIGNMENT = "misaligned"
    WRITE_ONLY = "read of a write-only register"
    READ_ONLY = "write to a read-only register"
    UNKNOWN = "no such register"
    VALUE = "meaningless value"
    NO_QUEUE = "no such queue"
    QUEUE_IN_USE = "the queue is in use"
    QUEUE_NOT_READY = "the queue is not ready"
    ORDER = "too early or too late (3.1.1)"
    FEATURES = "features not offered, or VIRTIO_F_VERSION_1 not accepted (2.2.1, 6.1)"
    WITHHELD = "withheld"
    BUSY = "a reset is under way"


class Refusals:
    """What a driver tried in vain: counted by register and reason, which is bounded whatever it does."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, Reason]] = Counter()
        self._told: set[str] = set()
        self._complaints: list[str] = []

    def add(self, name: str, reason: Reason, why: str = "") -> None:
        self.counts[name, reason] += 1
        if name not in self._told:
            self._told.add(name)
            self._complaints.append(f"{name}: {why or reason.value}")

    def take_complaints(self) -> list[str]:
        """What is new for the log: the first nonsense done to each register, in the life of the device."""
        complaints, self._complaints = self._complaints, []
        return complaints


# What a write asks for. Carried out in the given order, each reported to RegisterFile.finished or failed.


@dataclass(frozen=True, slots=True)
class SetDriverFeatures:
    """The driver accepted ``bits``, all of which the device offers."""

    bits: int


@dataclass(frozen=True, slots=True)
class SetStatus:
    status: int


@dataclass(frozen=True, slots=True)
class StartQueue:
    """Set the queue up and give it its eventfds; it must not look at its ring before ``EnableQueue``."""

    index: int
    setup: QueueSetup


@dataclass(frozen=True, slots=True)
class EnableQueue:
    """2.1.2: the driver is there (DRIVER_OK), the queue may consume buffers."""

    index: int


@dataclass(frozen=True, slots=True)
class StopQueue:
    index: int


@dataclass(frozen=True, slots=True)
class Reset:
    """Stop all queues and forget what the driver said."""


@dataclass(frozen=True, slots=True)
class WriteConfig:
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Notify:
    """A plain doorbell that no eventfd and no vCPU thread took."""

    index: int


@dataclass(frozen=True, slots=True)
class AcknowledgeInterrupt:
    bits: int


Operation = (
    SetDriverFeatures
    | SetStatus
    | StartQueue
    | EnableQueue
    | StopQueue
    | Reset
    | WriteConfig
    | Notify
    | AcknowledgeInterrupt
)
