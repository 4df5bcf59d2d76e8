"""The register file of a virtio-mmio device (virtio 1.3, 4.2.2), version 2, without any I/O.

``read`` answers at once. ``write`` answers with operations: the caller carries them out over the waist, in order, and
reports each with ``finished``, or the first that could not be done with ``failed``; the rest of that write's are then
dropped. Until then the registers read as before, as a driver that polls expects (4.2.2.1: QueueReady; 2.4: Status).

Nothing a driver does raises. What makes no sense does nothing (a read gives 0), is counted in ``refusals``, and makes
one line for the log, once a register.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from virtio import spec
from virtio.mmio.queues import VIRTIO_F_HYPERCALL_NOTIFY, WORD, Bells, QueueRegisters, State
from virtio.mmio.registers import (
    BY_OFFSET,
    CONFIG_NAME,
    CONFIG_OFFSET,
    MAGIC,
    UNKNOWN_NAME,
    VENDOR,
    VERSION,
    WINDOW_SIZE,
    Access,
    AcknowledgeInterrupt,
    EnableQueue,
    Operation,
    Reason,
    Refusals,
    Register,
    Reset,
    SetDriverFeatures,
    SetStatus,
    StartQueue,
    StopQueue,
    WriteConfig,
)

_NEVER_OFFERED: Final = (
    1 << spec.VIRTIO_F_NOTIFICATION_DATA  # a doorbell ends in an eventfd, which loses the value
    | VIRTIO_F_HYPERCALL_NOTIFY  # unless there are bells
)
_STATUS_OF_DRIVER: Final = (
    spec.VIRTIO_CONFIG_S_ACKNOWLEDGE
    | spec.VIRTIO_CONFIG_S_DRIVER
    | spec.VIRTIO_CONFIG_S_DRIVER_OK
    | spec.VIRTIO_CONFIG_S_FEATURES_OK
    | spec.VIRTIO_CONFIG_S_FAILED
)


class RegisterFile:
    """One device's registers.

    ``config_space`` gives all of the config space as it is now; ``interrupt_status`` the word that the vCPU thread
    normally serves. Both are only asked, within ``read``.
    """

    def __init__(
        self,
        *,
        device_id: int,
        device_features: int,
        queue_count: int,
        queue_size_max: int,
        config_space: Callable[[], bytes],
        interrupt_status: Callable[[], int] = lambda: 0,
    ) -> None:
        self._device_features = device_features & ~_NEVER_OFFERED
        self._config_space = config_space
        self._config = b""
        self._generation = 0
        self._resetting = False
        self._refusals = Refusals()
        self._queues = queues = QueueRegisters(queue_count, queue_size_max, self._refusals)
        self._readers: Final[Mapping[str, Callable[[], int]]] = {
            "MagicValue": lambda: MAGIC,
            "Version": lambda: VERSION,
            "DeviceID": lambda: device_id,
            "VendorID": lambda: VENDOR,
            "DeviceFeatures": self._read_device_features,
            "QueueNumMax": lambda: queue_size_max if queues.exists else 0,
            "QueueReady": lambda: int(queues.selected.state in (State.READY, State.STOPPING)),
            "InterruptStatus": interrupt_status,
            "Status": lambda: queues.driver.status,
            # 4.2.2: a shared memory region that does not exist has length -1, and base -1.
            "SHMLenLow": lambda: WORD,
            "SHMLenHigh": lambda: WORD,
            "SHMBaseLow": lambda: WORD,
            "SHMBaseHigh": lambda: WORD,
            "QueueReset": self._read_queue_reset,
            "HypercallKey": lambda: queues.bells.key if queues.bells else 0,
            "HypercallBell": lambda: queues.bell(queues.selector),
            "ConfigGeneration": self._read_generation,
        }
        self._writers: Final[Mapping[str, Callable[[int], Sequence[Operation]]]] = {
            "DeviceFeaturesSel": partial(self._write_selector, "device_features_sel"),
            "DriverFeatures": self._write_driver_features,
            "DriverFeaturesSel": partial(self._write_selector, "driver_features_sel"),
            "QueueSel": queues.select,
            "QueueNum": queues.set_size,
            "QueueReady": queues.set_ready,
            "QueueNotify": queues.notify,
            "InterruptACK": lambda bits: [AcknowledgeInterrupt(bits)],
            "Status": self._write_status,
            "QueueDescLow": partial(queues.set_area, "QueueDescLow", "desc", 0),
            "QueueDescHigh": partial(queues.set_area, "QueueDescHigh", "desc", 32),
            "QueueDriverLow": partial(queues.set_area, "QueueDriverLow", "driver", 0),
            "QueueDriverHigh": partial(queues.set_area, "QueueDriverHigh", "driver", 32),
            "QueueDeviceLow": partial(queues.set_area, "QueueDeviceLow", "device", 0),
            "QueueDeviceHigh": partial(queues.set_area, "QueueDeviceHigh", "device", 32),
            "SHMSel": lambda _: [],
            "QueueReset": queues.reset_queue,
            "HypercallBell": queues.accept_bell,
        }

    # ---- what a vCPU does ----

    def read(self, offset: int, size: int) -> int:
        """The ``size`` bytes at ``offset``, little-endian."""
        if offset >= CONFIG_OFFSET:
            return self._read_config(offset, size)
        register = self._register(offset, size)
        if register is None:
            return 0
        if Access.R not in register.access:
            self._refusals.add(register.name, Reason.WRITE_ONLY)
            return 0
        return self._readers[register.name]() & WORD

    def write(self, offset: int, size: int, value: int) -> Sequence[Operation]:
        """What is to be done because ``value`` was written."""
        if offset >= CONFIG_OFFSET:
            return self._write_config(offset, size, value)
        register = self._register(offset, size)
        if register is None:
            return []
        if Access.W not in register.access:
            self._refusals.add(register.name, Reason.READ_ONLY)
            return []
        if self._resetting:
            self._refusals.add(register.name, Reason.BUSY)
            return []
        return self._writers[register.name](value & WORD)

    def _register(self, offset: int, size: int) -> Register | None:
        register = BY_OFFSET.get(offset & ~3)
        if register is None:
            self._refusals.add(UNKNOWN_NAME, Reason.UNKNOWN)
        elif offset & 3:  # 4.2.2.2: only 32-bit wide and aligned accesses
            self._refusals.add(register.name, Reason.ALIGNMENT)
        elif size != 4:
            self._refusals.add(register.name, Reason.SIZE)
        else:
            return register
        return None

    # ---- how operations went ----

    def finished(self, operation: Operation) -> None:
        """``operation`` has been carried out."""
        match operation:
            case StartQueue(index=index):
                self._queues.queues[index].state = State.READY
            case StopQueue(index=index):
                self._queues.stopped(index)
            case Reset():
                self._resetting = False
                self._queues.forget()

    def failed(self, operation: Operation) -> None:
        """``operation`` could not be done. Where a queue or the device is lost by that, only a reset mends it."""
        match operation:
            case SetDriverFeatures():
                self._queues.driver.status &= ~(spec.VIRTIO_CONFIG_S_FEATURES_OK | spec.VIRTIO_CONFIG_S_DRIVER_OK)
            case StartQueue(index=index):
                self._queues.queues[index].state = State.IDLE
                self.needs_reset()
            case EnableQueue():
                self.needs_reset()
            case StopQueue() | Reset():
                self.finished(operation)
                self.needs_reset()

    def needs_reset(self) -> None:
        """2.1.2: the device is in a state that only a reset ends. The caller raises a config interrupt as well."""
        self._queues.driver.status |= spec.VIRTIO_CONFIG_S_NEEDS_RESET

    # ---- what the caller may want to know ----

    @property
    def status(self) -> int:
        return self._queues.driver.status

    @property
    def driver_ok(self) -> bool:
        """The driver is there: it may be interrupted (2.1.2)."""
        return self._queues.driver.ok

    @property
    def refusals(self) -> Mapping[tuple[str, Reason], int]:
        """How often accesses did nothing, by the register's name and the reason."""
        return self._refusals.counts

    def take_complaints(self) -> list[str]:
        """What is new for the log: the first nonsense done to each register, in the life of the device."""
        return self._refusals.take_complaints()

    # ---- the hypercall doorbell ----

    def offer_bells(self, bells: Bells) -> None:
        """Offer the hypercall doorbell from now on."""
        self._queues.offer_bells(bells)

    def withhold_bells(self) -> None:
        """From now on the registers read 0, and the feature is not offered."""
        self._queues.bells = None

    @property
    def bells_accepted(self) -> tuple[int, ...]:
        """The queues whose driver said that it may ring by hypercall. It says so for people; nothing depends on it."""
        return self._queues.bells_accepted

    # ---- features and status ----

    @property
    def offered(self) -> int:
        """The feature bits a driver is offered now."""
        return self._device_features | (VIRTIO_F_HYPERCALL_NOTIFY if self._queues.bells else 0)

    def _read_device_features(self) -> int:
        word = self._queues.driver.device_features_sel
        return self.offered >> 32 * word if word < 2 else 0

    def _write_selector(self, which: str, value: int) -> Sequence[Operation]:
        setattr(self._queues.driver, which, value)
        return []

    def _write_driver_features(self, value: int) -> Sequence[Operation]:
        driver = self._queues.driver
        if driver.features_ok:  # 3.1.1, step 5: no new bits after that
            self._refusals.add("DriverFeatures", Reason.ORDER)
            return []
        word = driver.driver_features_sel
        if word < 2:
            driver.features = driver.features & ~(WORD << 32 * word) | value << 32 * word
        elif value:
            driver.features_beyond = True
        return []

    def _write_status(self, value: int) -> Sequence[Operation]:
        driver = self._queues.driver
        if value == 0:  # 2.1: a reset; Status reads 0 when it is done
            self._resetting = True
            return [Reset()]
        if value & ~(_STATUS_OF_DRIVER | spec.VIRTIO_CONFIG_S_NEEDS_RESET):
            self._refusals.add("Status", Reason.VALUE)
        if driver.status & _STATUS_OF_DRIVER & ~value:  # 2.1.1: the driver must not clear a bit; it stays set
            self._refusals.add("Status", Reason.VALUE, "a bit was cleared without a reset (2.1.1)")
        new = value & _STATUS_OF_DRIVER & ~driver.status
        operations: list[Operation] = []
        if new & spec.VIRTIO_CONFIG_S_FEATURES_OK:
            if self._features_acceptable():
                operations.append(SetDriverFeatures(driver.features & ~VIRTIO_F_HYPERCALL_NOTIFY))
            else:
                self._refusals.add("Status", Reason.FEATURES)
                new &= ~spec.VIRTIO_CONFIG_S_FEATURES_OK  # 2.2.2, 3.1.1 step 6: it reads back without
        if new & spec.VIRTIO_CONFIG_S_DRIVER_OK and not (driver.status | new) & spec.VIRTIO_CONFIG_S_FEATURES_OK:
            self._refusals.add("Status", Reason.ORDER, "DRIVER_OK without FEATURES_OK (3.1.1)")
            new &= ~spec.VIRTIO_CONFIG_S_DRIVER_OK
        if new:
            driver.status |= new
            operations.append(SetStatus(driver.status))
        if new & spec.VIRTIO_CONFIG_S_DRIVER_OK:
            operations += [EnableQueue(index) for index in self._queues.live]
        return operations

    def _features_acceptable(self) -> bool:
        """2.2.2: only what was offered; 6.1: a device without a legacy interface needs VIRTIO_F_VERSION_1.

        The hypercall may have been withheld since the driver read that it was offered. That is no fault of the
        driver's, and no harm: the device behind never hears of the bit.
        """
        driver = self._queues.driver
        modern = driver.features >> spec.VIRTIO_F_VERSION_1 & 1
        offered = self.offered | (VIRTIO_F_HYPERCALL_NOTIFY if driver.hypercall_offered else 0)
        return bool(modern) and not driver.features & ~offered and not driver.features_beyond

    def _read_queue_reset(self) -> int:
        if self._queues.driver.negotiated(1 << spec.VIRTIO_F_RING_RESET):
            return int(self._queues.selected.resetting)
        self._refusals.add("QueueReset", Reason.ORDER)
        return 0

    # ---- config space ----

    def _look_at_config(self) -> bytes:
        """4.2.2.1: ConfigGeneration changes whenever what the driver may have read is not true any more.

        The generation moves with what is *seen* here, so no change can hide between two reads of one field.
        """
        now = self._config_space()
        if now != self._config:
            self._config = now
            self._generation = self._generation + 1 & WORD
        return now

    def _read_generation(self) -> int:
        self._look_at_config()
        return self._generation

    def _config_access(self, offset: int, size: int) -> bool:
        if size not in (1, 2, 4, 8):
            self._refusals.add(CONFIG_NAME, Reason.SIZE)
        elif offset % min(size, 4):  # 4.2.2.2: 64-bit fields are two 32-bit ones
            self._refusals.add(CONFIG_NAME, Reason.ALIGNMENT)
        elif offset + size > WINDOW_SIZE:
            self._refusals.add(UNKNOWN_NAME, Reason.UNKNOWN)
        else:
            return True
        return False

    def _read_config(self, offset: int, size: int) -> int:
        if not self._config_access(offset, size):
            return 0
        at = offset - CONFIG_OFFSET
        return int.from_bytes(self._look_at_config()[at : at + size], "little")

    def _write_config(self, offset: int, size: int, value: int) -> Sequence[Operation]:
        if not self._config_access(offset, size):
            return []
        if self._resetting:
            self._refusals.add(CONFIG_NAME, Reason.BUSY)
            return []
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return [WriteConfig(offset - CONFIG_OFFSET + at, data[at : at + 4]) for at in range(0, size, 4)]
