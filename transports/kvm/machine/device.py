"""One device of our own VM: its register file on one side, the waist on the other, KVM's eventfds between them.

Doorbells and the interrupt are registered once, for the life of the device, and each has an eventfd of its own; the
back end gets duplicates while a queue runs. A doorbell rung while it does not is counted in its eventfd and read later.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
import trio

from transports.base import BackendLike
from transports.hypercall import RESERVED_ID, HypercallKind, Policy, connection_id, offers
from transports.kvm.machine.slots import Slot
from transports.kvm.machine.state import MmioDeviceState, QueueBell
from transports.kvm.vm.ram import GuestRam
from transports.kvm.vm.vmm import Access, Vm
from virtio import spec
from virtio.errors import GuestError, HostError, PeerError
from virtio.fd import OwnedFd
from virtio.mmio.queues import Bells
from virtio.mmio.register_file import RegisterFile
from virtio.mmio.registers import (
    OFFSETS,
    WINDOW_SIZE,
    AcknowledgeInterrupt,
    EnableQueue,
    Notify,
    Operation,
    Reset,
    SetDriverFeatures,
    SetStatus,
    StartQueue,
    StopQueue,
    WriteConfig,
)
from virtio.native.interrupt import InterruptStatus
from virtio.waist import ConfigChanged, Doorbell, MemoryRegion, QueueBroken, QueueSetup

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

LINES_MAX: Final = 32
"""Lines of the log that one device's guest can cause by breaking its queues, which it may do for ever."""


@dataclass(frozen=True, slots=True)
class HypercallOffer:
    """What a VM has for hypercall doorbells. ``key`` None: it has no platform key, and no device offers any."""

    kind: HypercallKind
    key: int | None
    guest_may_nest: bool


class _QueueFds:
    """One queue's eventfds, one for each kind of doorbell, and whether its connection id is registered."""

    def __init__(self, stack: ExitStack) -> None:
        self.kick = _eventfd(stack)
        self.pio = _eventfd(stack)
        self.hypercall = _eventfd(stack)
        self.connection: int | None = None
        self.started = False


class MmioDevice:
    """A context manager; ``serve`` passes on what the device has to say, ``answer`` is for ``Vm.run``."""

    def __init__(
        self, vm: Vm, ram: GuestRam, slot: Slot, backend: BackendLike, hypercalls: HypercallOffer, policy: Policy
    ) -> None:
        self.slot = slot
        self.backend = backend
        self.interrupt = InterruptStatus()
        self._vm = vm
        self._ram = ram
        self._hypercalls = hypercalls
        self._policy: Policy = policy
        self._refusals: Counter[str] = Counter()
        self._lines = 0
        self._lock = trio.Lock()  # operations come from the guest, and from whoever changes the policy
        self._log: FilteringBoundLogger = structlog.get_logger().bind(device=backend.name)
        self.registers = RegisterFile(
            device_id=backend.device_id,
            device_features=backend.device_features(),
            queue_count=backend.queue_count,
            queue_size_max=backend.queue_size_max,
            config_space=self._config_space,
            interrupt_status=lambda: self.interrupt.value,
        )
        with ExitStack() as stack:
            self._irq = _eventfd(stack)
            self._queues = [_QueueFds(stack) for _ in range(backend.queue_count)]
            stack.callback(backend.set_interrupt_status, None)
            backend.set_interrupt_status(self.interrupt)
            self.window = vm.add_window(
                slot.gpa, WINDOW_SIZE, interrupt_status=self.interrupt, notify_port=slot.port or None
            )
            self._register_doorbells(stack)
            self._stack = stack.pop_all()

    def _register_doorbells(self, stack: ExitStack) -> None:
        stack.callback(self._vm.irqfd(self.slot.gsi, self._irq).remove)
        notify = self.slot.gpa + OFFSETS["QueueNotify"]
        for index, fds in enumerate(self._queues):
            # With one queue there is nothing to tell apart, and KVM finds a wildcard faster.
            one = len(self._queues) == 1
            length, match = (0, None) if one else (4, index)
            stack.callback(self._vm.ioeventfd_mmio(notify, length, match, fds.kick).remove)
            # What comes out of the guest all the same rings too.
            self.window.set_kick(index, fds.kick)
            if self.slot.port:
                stack.callback(self._vm.ioeventfd_pio(self.slot.port, 2, index, fds.pio).remove)

    async def __aenter__(self) -> MmioDevice:
        try:
            await self._give_memory()
            if self._offered:
                await self._offer()
        except BaseException:
            self._stack.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """The VM does not run any more."""
        with trio.CancelScope(shield=True):
            try:
                for index in self.rung_by_hypercall:
                    self._withdraw_id(index)
                await self.backend.reset()
            finally:
                self._stack.close()

    async def _give_memory(self) -> None:
        ram = self._ram
        await self.backend.set_memory([MemoryRegion(0, ram.size, 0, 0, ram.fd.duplicate())])

    def _config_space(self) -> bytes:
        try:
            return self.backend.read_config(0, spec.CONFIG_SPACE_MAX)
        except HostError as error:  # the device's mistake; a read has no way to fail
            self._warn("the config space reads as zeroes", error=str(error))
            return bytes(spec.CONFIG_SPACE_MAX)

    # ---- what the guest does ----

    async def answer(self, access: Access) -> int:
        """One access to a register; a write is answered when what it asks for is done."""
        if access.is_write:
            await self._perform(self.registers.write(access.offset, access.length, access.data))
            value = 0
        else:
            value = self.registers.read(access.offset, access.length)
        for complaint in self.registers.take_complaints():
            self._log.warning(f"the guest's access to a register does nothing: {complaint}")
        return value

    async def _perform(self, operations: Sequence[Operation]) -> None:
        if not operations:
            return
        async with self._lock:
            for operation in operations:
                try:
                    await self._do(operation)
                except (GuestError, PeerError, HostError) as error:
                    self._warn("the driver's request failed", request=type(operation).__name__, error=str(error))
                    self.registers.failed(operation)
                    self._tell_if_reset_is_needed()
                    return
                self.registers.finished(operation)

    async def _do(self, operation: Operation) -> None:
        match operation:
            case SetDriverFeatures(bits=bits):
                self.backend.set_driver_features(bits)
            case SetStatus(status=status):
                self.backend.set_status(status)
            case StartQueue(index=index, setup=setup):
                await self._start_queue(index, setup)
            case EnableQueue(index=index):
                # Not earlier: a new call fd is signalled at once, and 2.1.2 allows no interrupt before DRIVER_OK.
                await self.backend.set_call(index, self._irq.duplicate())
                await self.backend.enable_queue(index, True)
            case StopQueue(index=index):
                await self._stop_queue(index)
            case Reset():
                await self.backend.reset()
                for fds in self._queues:
                    fds.started = False
                self.interrupt.clear()
                await self._give_memory()
            case WriteConfig(offset=offset, data=data):
                self.backend.write_config(offset, data)
            case Notify(index=index):
                os.eventfd_write(self._queues[index].kick.fileno(), 1)
            case AcknowledgeInterrupt(bits=bits):
                self.interrupt.acknowledge(bits)

    async def _start_queue(self, index: int, setup: QueueSetup) -> None:
        fds = self._queues[index]
        await self.backend.configure_queue(index, setup)
        try:
            await self.backend.set_kick(index, fds.kick.duplicate())
            if self.slot.port:
                await self.backend.set_doorbell(index, Doorbell.PIO, fds.pio.duplicate())
            if fds.connection is not None:
                await self.backend.set_doorbell(index, Doorbell.HYPERCALL, fds.hypercall.duplicate())
            fds.started = True
        except BaseException:
            await self._stop_queue(index)
            raise

    async def _stop_queue(self, index: int) -> None:
        self._queues[index].started = False
        await self.backend.enable_queue(index, False)
        await self.backend.stop_queue(index)

    # ---- what the device says ----

    async def serve(self) -> None:
        """Pass on the device's events, until cancelled."""
        while True:
            event = await self.backend.next_event()
            if isinstance(event, ConfigChanged):
                self._raise_config()
            elif isinstance(event, QueueBroken):
                self._warn("queue broken", queue=event.index, error=str(event.error))
                if self.backend.status & spec.VIRTIO_CONFIG_S_NEEDS_RESET:  # unless there was one in the meantime
                    self.registers.needs_reset()
                    self._tell_if_reset_is_needed()

    def _tell_if_reset_is_needed(self) -> None:
        """2.1.2: DEVICE_NEEDS_RESET comes with a configuration change notification."""
        if self.registers.status & spec.VIRTIO_CONFIG_S_NEEDS_RESET:
            self._raise_config()

    def _raise_config(self) -> None:
        if self.registers.driver_ok:
            self.interrupt.raise_config()
            os.eventfd_write(self._irq.fileno(), 1)

    def _warn(self, event: str, **details: object) -> None:
        """A line about what the driver did, as long as it does not do it too often."""
        self._lines += 1
        if self._lines <= LINES_MAX:
            self._log.warning(event, **details)
        if self._lines == LINES_MAX:
            self._log.warning("the driver goes on like this: no more lines about it")

    # ---- the hypercall doorbell ----

    @property
    def policy(self) -> Policy:
        return self._policy

    def state(self) -> MmioDeviceState:
        """What is shown of it."""
        accepted = self.registers.bells_accepted
        bells = tuple(
            QueueBell(index, self.slot.bell(index), fds.connection is not None, index in accepted)
            for index, fds in enumerate(self._queues)
        )
        return MmioDeviceState(bells, self.window.stray_notifies, dict(self._refusals))

    @property
    def rung_by_hypercall(self) -> tuple[int, ...]:
        """The queues whose connection id is registered, so that the guest can ring them so."""
        return tuple(index for index, fds in enumerate(self._queues) if fds.connection is not None)

    @property
    def _offered(self) -> bool:
        offer = self._hypercalls
        if offer.key is None or offer.kind.why_not is not None:
            return False
        return offers(self._policy, guest_may_nest=offer.guest_may_nest)

    async def set_policy(self, policy: Policy) -> None:
        """Offer or withhold the hypercall doorbell from now on, also while the guest uses it: nothing is lost.

        What fails is one line a queue, which keeps what it had. The same policy again tries again.
        """
        async with self._lock:
            self._policy = policy
            if self._offered:
                await self._offer()
            else:
                self.registers.withhold_bells()
                for index in self.rung_by_hypercall:
                    await self._withdraw(index)
        self._log.info("hypercall doorbell", policy=policy, offered=self._offered)

    async def _offer(self) -> None:
        """An id is registered for every queue before its bell is shown: what a driver rings is heard."""
        key = self._hypercalls.key
        assert key is not None
        numbers = []
        for index in range(len(self._queues)):
            number = self.slot.bell(index)
            connection = connection_id(number, key) if number else RESERVED_ID
            heard = connection != RESERVED_ID and await self._register(index, connection)
            numbers.append(number if heard else 0)
        self.registers.offer_bells(Bells(key, tuple(numbers)))

    async def _register(self, index: int, connection: int) -> bool:
        fds = self._queues[index]
        if fds.connection is not None:
            return True
        try:
            if fds.started:  # it listens before anybody can ring
                await self.backend.set_doorbell(index, Doorbell.HYPERCALL, fds.hypercall.duplicate())
            self._hypercalls.kind.register(connection, fds.hypercall)
        except (HostError, PeerError) as error:
            number = error.errno if isinstance(error, HostError) else 0
            self._refusals[errno.errorcode.get(number, "other")] += 1
            self._log.warning("no hypercall doorbell, the plain ones go on", queue=index, error=str(error))
            await self._stop_listening(index)
            return False
        fds.connection = connection
        return True

    def _withdraw_id(self, index: int) -> bool:
        """KVM signals the hypercall's eventfd no more; False when KVM refused to let go."""
        fds = self._queues[index]
        if fds.connection is None:
            return True
        try:
            self._hypercalls.kind.withdraw(fds.connection)
        except HostError as error:
            self._log.error("a connection id could not be withdrawn", queue=index, error=str(error))
            return False
        fds.connection = None
        return True

    async def _withdraw(self, index: int) -> None:
        """DOORBELLS.md: status 0 tells the driver that an eventfd was signalled, so no count may be lost.

        First KVM lets go, so that no more can come; then the plain doorbell is rung for what may have come; only then
        does the queue stop to look at the eventfd. If KVM does not let go, the queue goes on looking.
        """
        if self._withdraw_id(index):
            os.eventfd_write(self._queues[index].kick.fileno(), 1)
            await self._stop_listening(index)

    async def _stop_listening(self, index: int) -> None:
        """To an eventfd that KVM does not signal: should the queue go on, it does so in vain."""
        if self._queues[index].started:
            try:
                await self.backend.set_doorbell(index, Doorbell.HYPERCALL, None)
            except (HostError, PeerError) as error:
                self._log.warning("a hypercall doorbell that rings no more stays", queue=index, error=str(error))


def _eventfd(stack: ExitStack) -> OwnedFd:
    return stack.enter_context(OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)))
