"""Which doorbells of which VMs get a connection id: the state and the rules, without I/O.

A VM's library reports its PIO doorbells with their eventfds; a back-end reports the kick fd of each of its queues.
Where the two are the same eventfd, the doorbell is that queue's, and the device's policy decides. What the library
shall do is not queued: a bell *is* to be registered or not, and ``Vm.commands`` gives what it has not been told.
"""

from __future__ import annotations

import errno
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

import structlog

from transports.hypercall import Policy, offers
from transports.stock_qemu.descriptors import VcpuStatistics
from transports.stock_qemu.messages import REASON_TEXTS, WIRE_BELL_REGISTERED, Message, Reason, Type, VmFlag
from transports.stock_qemu.state import BellState, VmState
from virtio.errors import PeerError

BELLS_MAX: Final = 4096  # of one VM, as in the library
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,30}")

T = TypeVar("T")

Queue = tuple[str, int]
"""A device's name and the index of its queue."""


def is_vm_name(text: str) -> bool:
    """Whether ``text`` may name a VM: it becomes the label of a metric."""
    return _NAME.fullmatch(text) is not None


@dataclass(eq=False, slots=True)
class Bell:
    """One PIO doorbell of a VM."""

    vm: Vm
    number: int
    serial: int
    eventfd: int | None
    told: bool | None  # what the library was last told: registered or not; None: nothing
    registered: bool
    queues: set[Queue] = field(default_factory=set)  # whose it is; a queue that stops leaves it, until it gets another
    error: int = 0  # why it is not registered though it should be


@dataclass(eq=False, slots=True)
class Vm:
    """One VM whose library is connected. ``changed`` is called when ``commands`` has something to give.

    ``is_over``: whether its library has left, though what it said before may not have been read yet.
    """

    name: str
    pid: int
    changed: Callable[[], None]
    is_over: Callable[[], bool]
    flags: VmFlag = field(default=VmFlag(0))
    reason: Reason = Reason.NONE
    known: bool = False  # its first message has come
    replaced: bool = False  # its library has connected anew, and that connection has the name now
    welcomed: bool = False
    bells: dict[int, Bell] = field(default_factory=dict)
    vcpus: dict[int, VcpuStatistics] = field(default_factory=dict)
    due: dict[int, bool] = field(default_factory=dict)  # bell number: to be registered or not
    logged: set[str] = field(default_factory=set)  # errors that have had their log line
    since: float = field(default_factory=time.time)

    def commands(self) -> Iterator[Message]:
        """What the library must be told now; each is taken as told once it was given."""
        if self.known and not self.welcomed:
            self.welcomed = True
            yield Message(Type.WELCOME)
        while self.due:
            number, on = next(iter(self.due.items()))
            del self.due[number]
            bell = self.bells[number]
            bell.told = on
            yield Message(Type.REGISTER if on else Type.WITHDRAW, bell=number, serial=bell.serial)


class QemuDoorbells:
    """All VMs, all kick fds, all policies. Everything in one thread, nothing waits."""

    def __init__(self) -> None:
        self._policies: dict[str, Policy] = {}
        self._vms: list[Vm] = []
        self._kicks: dict[Queue, int] = {}
        self._queues: dict[int, set[Queue]] = {}  # by eventfd
        self._bells: dict[int, set[Bell]] = {}  # by eventfd
        self.refusals: Final[Counter[str]] = Counter()
        self._log = structlog.get_logger()

    # What the back-ends and the operator say

    def kick_changed(self, device: str, queue: int, eventfd: int | None) -> None:
        """The queue's kick fd is another, or it has none because it stands.

        A queue that stands keeps its ids: they ring QEMU's own eventfd, as the plain doorbell does. QEMU takes both
        away, reads that eventfd and starts the queue with another; a guest that finds its id gone would not try again
        for seconds.
        """
        owner = (device, queue)
        before = self._kicks.get(owner)
        if before is not None:
            _remove(self._queues, before, owner)
        if eventfd is None:
            return
        self._kicks[owner] = eventfd
        self._queues.setdefault(eventfd, set()).add(owner)
        if before is not None and before != eventfd:
            for bell in self._bells.get(before, ()):
                if owner in bell.queues:
                    bell.queues.remove(owner)
                    self._judge(bell, lost=True)
        for bell in self._bells.get(eventfd, ()):
            bell.queues.add(owner)
            self._judge(bell)

    def set_policy(self, device: str, policy: Policy) -> None:
        """From now on ``device`` offers the hypercall, or does not."""
        self._policies[device] = policy
        for bells in self._bells.values():
            for bell in bells:
                self._judge(bell)

    # What the libraries say

    def connect(self, pid: int, changed: Callable[[], None], is_over: Callable[[], bool]) -> Vm:
        """A library has connected; its VM is shown once it has told of it."""
        vm = Vm("", pid, changed, is_over)
        self._vms.append(vm)
        return vm

    def disconnect(self, vm: Vm) -> None:
        self._vms.remove(vm)
        for bell in list(vm.bells.values()):
            self._forget(bell)
        for statistics in vm.vcpus.values():
            statistics.close()
        vm.vcpus.clear()

    def receive(self, vm: Vm, message: Message, eventfd: int | None = None) -> None:
        """One message of the library's, all but VCPU; ``eventfd`` is the number of what came with BELL."""
        if message.type == Type.VM:
            self._vm_changed(vm, message)
        elif not vm.known:
            raise PeerError("the first message does not tell of the VM")
        elif message.type == Type.BELL:
            self._bell_appeared(vm, message, eventfd)
        elif message.type == Type.BELL_GONE:
            self._forget(self._bell(vm, message))
        elif message.type == Type.ANSWER:
            self._answered(vm, message)

    def add_vcpu(self, vm: Vm, number: int, statistics: VcpuStatistics) -> None:
        """Takes ``statistics``."""
        if not vm.known:
            statistics.close()
            raise PeerError("the first message does not tell of the VM")
        earlier = vm.vcpus.pop(number, None)
        if earlier is not None:
            earlier.close()
        vm.vcpus[number] = statistics

    @property
    def vcpu_count(self) -> int:
        """Statistics held, of all VMs: each is a descriptor."""
        return sum(len(vm.vcpus) for vm in self._vms)

    def _vm_changed(self, vm: Vm, message: Message) -> None:
        try:
            reason = Reason(message.result)
        except ValueError:
            raise PeerError(f"there is no reason {message.result}") from None
        if vm.reason not in (Reason.NONE, reason):
            raise PeerError(f"the reason {vm.reason.name} has become {reason.name}: the first one given stays")
        if not vm.known:
            vm.name = self._name_for(message.name, vm.pid)
            vm.known = True
            self._log.info("a VM's QEMU connected", vm=vm.name, pid=vm.pid)
        vm.flags = VmFlag(message.flags & sum(VmFlag))
        if reason is not vm.reason and reason is not Reason.NONE:
            self.refusals[reason.name.lower()] += 1
            self._log.warning("no hypercall doorbell for this VM", vm=vm.name, reason=REASON_TEXTS[reason])
        vm.reason = reason
        for bell in vm.bells.values():
            self._judge(bell)
        vm.changed()

    def _name_for(self, wanted: str, pid: int) -> str:
        """``wanted`` if it is a name and free, else vm0, vm1, ...: never anything the guest has chosen."""
        named = {vm.name: vm for vm in self._vms if not vm.replaced}
        if is_vm_name(wanted) and wanted in named and named[wanted].is_over():
            # It comes back faster than its end was noticed. One that is still there keeps its name: a process may have
            # several VMs, and they would take it from each other for ever.
            named.pop(wanted).replaced = True
        if is_vm_name(wanted) and wanted not in named:
            return wanted
        if wanted:
            self._log.warning("this name of a VM is taken or is none", name=ascii(wanted), pid=pid)
        return next(name for name in (f"vm{number}" for number in range(len(self._vms) + 1)) if name not in named)

    def _bell_appeared(self, vm: Vm, message: Message, eventfd: int | None) -> None:
        earlier = vm.bells.get(message.bell)
        if earlier is not None:
            self._forget(earlier)
        if len(vm.bells) >= BELLS_MAX:
            raise PeerError(f"more than {BELLS_MAX} doorbells")
        registered = bool(message.flags & WIRE_BELL_REGISTERED)
        # An id that was there before this daemon stays until there is a queue to judge it by: it is QEMU's eventfd.
        bell = Bell(vm, message.bell, message.serial, eventfd, registered or None, registered)
        vm.bells[bell.number] = bell
        if eventfd is not None:
            self._bells.setdefault(eventfd, set()).add(bell)
            bell.queues |= self._queues.get(eventfd, set())
        self._judge(bell)

    def _bell(self, vm: Vm, message: Message) -> Bell:
        bell = vm.bells.get(message.bell)
        if bell is None or (message.type == Type.ANSWER and bell.serial != message.serial):
            raise PeerError(f"bell {message.bell:#x} was not reported")
        return bell

    def _answered(self, vm: Vm, message: Message) -> None:
        bell = self._bell(vm, message)
        bell.registered = bool(message.flags & WIRE_BELL_REGISTERED)
        bell.error = message.result if bell.told else 0
        if bell.error:
            name = errno.errorcode.get(bell.error, "other")
            self.refusals[name] += 1
            if name not in vm.logged:
                vm.logged.add(name)
                self._log.warning("KVM refuses a connection id", vm=vm.name, bell=f"{bell.number:#08x}", error=name)

    def _forget(self, bell: Bell) -> None:
        bell.vm.bells.pop(bell.number, None)
        bell.vm.due.pop(bell.number, None)
        if bell.eventfd is not None:
            _remove(self._bells, bell.eventfd, bell)

    # The rule

    def _is_offered(self, bell: Bell) -> bool:
        vm = bell.vm
        return (
            vm.reason is Reason.NONE
            and VmFlag.KEY_SHOWN in vm.flags
            and bool(bell.queues)
            and all(
                offers(self._policies.get(device, "withhold"), guest_may_nest=VmFlag.MAY_NEST in vm.flags)
                for device, _ in bell.queues
            )
        )

    def _judge(self, bell: Bell, *, lost: bool = False) -> None:
        """Note what the library must be told of ``bell``. ``lost``: it was a queue's until now."""
        if not lost and not bell.queues:
            return
        on = self._is_offered(bell)
        if on == (bell.told or False):
            bell.vm.due.pop(bell.number, None)
        else:
            bell.vm.due[bell.number] = on
            bell.vm.changed()

    # What is shown

    def snapshot(self) -> tuple[VmState, ...]:
        """Every VM now."""
        return tuple(self._vm_state(vm) for vm in self._vms if vm.known and not vm.replaced)

    def _vm_state(self, vm: Vm) -> VmState:
        return VmState(
            name=vm.name,
            pid=vm.pid,
            since=vm.since,
            key_shown=VmFlag.KEY_SHOWN in vm.flags,
            key_stable=VmFlag.KEY_STABLE in vm.flags,
            may_nest=VmFlag.MAY_NEST in vm.flags,
            reason=REASON_TEXTS[vm.reason],
            vcpus=len(vm.vcpus),
            hypercalls=sum(statistics.hypercalls() for statistics in vm.vcpus.values()),
            bells=tuple(
                BellState(
                    bell=bell.number,
                    device=device,
                    queue=queue,
                    registered=bell.registered,
                    error=errno.errorcode.get(bell.error, "other") if bell.error else "",
                )
                for bell in vm.bells.values()
                for device, queue in sorted(bell.queues)
            ),
        )


def _remove(index: dict[int, set[T]], key: int, item: T) -> None:
    """``item`` is no longer under ``key``, and no empty set stays behind."""
    items = index.get(key)
    if items is not None:
        items.discard(item)
        if not items:
            del index[key]
