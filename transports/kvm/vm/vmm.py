"""A virtual machine of our own: memory, vCPUs in C threads, doorbells, and devices whose registers Python answers.

``Vm`` is made, given doorbells and device windows, and run. Only ``run`` has threads: they live inside it. What a vCPU
cannot do by itself it hands over: it waits while ``on_access`` finds the answer.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol

import trio

from transports.kvm.cpu.cpuid import CpuidEntry, CpuidSetup, PlatformKey, guest_cpuid, guest_may_nest
from transports.kvm.host import KVM_PATH, Kvm
from transports.kvm.native import check, ffi, lib
from transports.kvm.vm.doorbells import Doorbells, Registration
from transports.kvm.vm.ending import VmEnd, describe_end
from transports.kvm.vm.entry import Entry, entry_state
from transports.kvm.vm.ram import GuestRam
from virtio.errors import HostError
from virtio.fd import OwnedFd, take_count

OUTPUT_CHUNK: Final = 65536

_STEPS: Final = {
    lib.VM_STEP_CREATE: "KVM_CREATE_VM",
    lib.VM_STEP_TSS: "KVM_SET_TSS_ADDR",
    lib.VM_STEP_IDENTITY_MAP: "KVM_SET_IDENTITY_MAP_ADDR",
    lib.VM_STEP_IRQCHIP: "KVM_CREATE_IRQCHIP",
    lib.VM_STEP_PIT: "KVM_CREATE_PIT2",
    lib.VM_STEP_RAM: "mapping guest memory",
    lib.VM_STEP_MEMORY_SLOT: "KVM_SET_USER_MEMORY_REGION",
    lib.VM_STEP_VCPU: "KVM_CREATE_VCPU",
    lib.VM_STEP_VCPU_STATE: "mapping a vCPU's state",
    lib.VM_STEP_ALLOCATE: "memory for a VM",
}


class HasAddress(Protocol):
    """``virtio.native.interrupt.InterruptStatus``: an atomic 32-bit word of C's, for as long as the object lives."""

    @property
    def address(self) -> int: ...


@dataclass(frozen=True, slots=True)
class VmSetup:
    """``ram`` stays the caller's, to be closed after the VM. ``nested``: the guest may be a hypervisor itself, where
    the host can do it. ``platform``: the guest gets the key of the hypercall doorbell in its CPUID."""

    ram: GuestRam
    vcpus: int = 1
    nested: bool = False
    platform: PlatformKey | None = None
    kvm_path: str = KVM_PATH


@dataclass(frozen=True, slots=True)
class VmStats:
    """Counters of a VM, since it was made."""

    exits: int
    handed_over: int
    served: int
    stray_notifies: int
    pio: int
    unknown_mmio: int
    unknown_pio: int
    refused_hypercalls: int
    output_dropped: int


class Window:
    """Where one device's registers are in guest physical memory."""

    def __init__(self, pointer: Any, index: int, gpa: int, size: int, kept: object) -> None:
        self.index = index
        self.gpa = gpa
        self.size = size
        self.lock = trio.Lock()
        self._pointer = pointer
        self._kept = kept

    def set_kick(self, queue_index: int, fd: OwnedFd | None) -> None:
        """What a notification of that queue rings when it comes out of the guest, because no ioeventfd took it."""
        number = fd.fileno() if fd is not None else -1
        check(
            lib.window_set_kick(self._pointer, queue_index, number),
            f"kick fd of queue {queue_index} of the device at {self.gpa:#x}",
        )

    @property
    def stray_notifies(self) -> int:
        """Notifications of queues that nobody serves."""
        return lib.window_strays(self._pointer)


@dataclass(frozen=True, slots=True)
class Access:
    """A register access that waits for its answer; ``data`` is what is written."""

    window: Window
    vcpu: int
    offset: int
    length: int
    is_write: bool
    data: int


OnAccess = Callable[[Access], Awaitable[int]]
OnOutput = Callable[[bytes], None]


class Vm:
    """``with Vm(setup) as vm``: the machine exists inside the block. Raises ``HostError`` when it cannot be made."""

    def __init__(self, setup: VmSetup) -> None:
        self.setup = setup
        self._windows: list[Window] = []
        self._busy = False
        self._stop_wanted = False
        self._event_fd = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._output = ffi.new("uint8_t[]", OUTPUT_CHUNK)
        self._pointer: Any = None
        try:
            with Kvm.open(setup.kvm_path) as kvm:
                if not 0 < setup.vcpus <= kvm.vcpus_max:
                    raise HostError(f"{setup.vcpus} vCPUs: a VM here can have between 1 and {kvm.vcpus_max}")
                self._create(kvm)
                self._show_cpuid(kvm)
            self._doorbells = Doorbells(self._pointer, kvm.why_no_hypercall)
            self.why_no_hypercall = kvm.why_no_hypercall
        except BaseException:
            self._free()
            raise

    def _create(self, kvm: Kvm) -> None:
        failure = ffi.new("struct vm_failure *")
        ram = self.setup.ram
        pointer = lib.vm_new(
            kvm.fd.fileno(), ram.fd.fileno(), ram.size, self.setup.vcpus, self._event_fd.fileno(), failure
        )
        if pointer == ffi.NULL:
            check(failure.code, f"{_STEPS[failure.step]} ({self.setup.kvm_path})")
            raise HostError("a VM could not be made")
        self._pointer = pointer

    def _show_cpuid(self, kvm: Kvm) -> None:
        shared = CpuidSetup(
            vcpus=self.setup.vcpus,
            nested=self.setup.nested,
            tsc_deadline=kvm.tsc_deadline,
            platform=self.setup.platform,
        )
        supported = kvm.supported_cpuid()
        self.guest_may_nest = guest_may_nest(guest_cpuid(supported, 0, shared))
        for vcpu in range(self.setup.vcpus):
            entries = guest_cpuid(supported, vcpu, shared)
            code = lib.vcpu_set_cpuid(self._pointer, vcpu, _raw_entries(entries), len(entries))
            if code == -errno.E2BIG:
                raise HostError(
                    f"this kernel's KVM has no room for the {len(entries)} CPUID entries that a vCPU is to have",
                    errno=errno.E2BIG,
                )
            check(code, f"the CPUID of vCPU {vcpu}")

    def ioeventfd_mmio(self, gpa: int, length: int, datamatch: int | None, fd: OwnedFd) -> Registration:
        """A write to ``gpa`` signals ``fd``: of that length and, if given, that value; length 0: any write."""
        return self._doorbells.ioeventfd_mmio(gpa, length, datamatch, fd)

    def ioeventfd_pio(self, port: int, length: int, datamatch: int | None, fd: OwnedFd) -> Registration:
        """The same for an ``out`` to ``port``."""
        return self._doorbells.ioeventfd_pio(port, length, datamatch, fd)

    def irqfd(self, gsi: int, fd: OwnedFd) -> Registration:
        """A write to ``fd`` raises the interrupt ``gsi`` in the guest (as an edge)."""
        return self._doorbells.irqfd(gsi, fd)

    def hypercall_id(self, connection_id: int, fd: OwnedFd) -> Registration:
        """SIGNAL_EVENT with that id signals ``fd``. ``HostError``: taken already, or the reason why this kernel has
        none (``why_no_hypercall``)."""
        return self._doorbells.hypercall_id(connection_id, fd)

    def add_window(
        self, gpa: int, size: int, *, interrupt_status: HasAddress | None = None, notify_port: int | None = None
    ) -> Window:
        """A device's registers, before the VM runs. With ``interrupt_status`` its register and InterruptACK are served
        in the vCPU's thread. An ``out`` to ``notify_port`` is a notification, as a write to QueueNotify is."""
        error = ffi.new("int *")
        word = ffi.cast("void *", interrupt_status.address) if interrupt_status is not None else ffi.NULL
        pointer = lib.vm_add_window(self._pointer, gpa, size, word, notify_port or 0, error)
        if pointer == ffi.NULL:
            check(error[0], f"a device window of {size:#x} bytes at {gpa:#x}")
        window = Window(pointer, len(self._windows), gpa, size, interrupt_status)
        self._windows.append(window)
        return window

    async def run(self, entry: Entry, on_access: OnAccess, on_output: OnOutput) -> VmEnd:
        """Run from ``entry`` until the guest ends, or ``stop``. The vCPU threads are joined when this returns, however.

        ``on_access`` answers one access of a window at a time (of different windows, several); for a write its result
        does not matter, and what it raises ends the run. ``on_output`` gets what the guest prints.
        A VM whose run ended by an exit or a stop may run again: vCPU 0 from the new entry, the others on.
        """
        if self._busy:
            raise RuntimeError("the VM runs already")
        self._busy, self._stop_wanted = True, False
        try:
            check(lib.vm_enter_at(self._pointer, entry_state(entry)), "the first state of vCPU 0")
            check(lib.vm_start(self._pointer), "starting the vCPU threads")
            try:
                async with trio.open_nursery() as nursery:
                    await self._attend(nursery, on_access, on_output)
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await self._join()
            while self._pass_output(on_output):
                pass
            end = self._end()
            return VmEnd("stopped", reason="stopped from outside") if end is None else end
        finally:
            self._busy = False

    async def _attend(self, nursery: trio.Nursery, on_access: OnAccess, on_output: OnOutput) -> None:
        access = ffi.new("struct access *")
        while True:
            await self._next_event()
            if self._pass_output(on_output):
                os.eventfd_write(self._event_fd.fileno(), 1)  # the rest in its turn: C tells only of the first byte
            while lib.vm_take_access(self._pointer, access):
                taken = Access(
                    window=self._windows[access.window],
                    vcpu=access.vcpu,
                    offset=access.offset,
                    length=access.length,
                    is_write=bool(access.is_write),
                    data=access.data,
                )
                nursery.start_soon(self._answer, taken, on_access)
            if self._stop_wanted or self._end() is not None:
                return

    async def _answer(self, access: Access, on_access: OnAccess) -> None:
        async with access.window.lock:
            value = await on_access(access)
        lib.vm_answer(self._pointer, access.vcpu, value & ((1 << 8 * access.length) - 1))

    def _pass_output(self, on_output: OnOutput) -> bool:
        """One chunk; whether there may be more. Not all there is: a guest may print faster than anybody can read."""
        count = lib.vm_take_output(self._pointer, self._output, OUTPUT_CHUNK)
        if count:
            on_output(bytes(ffi.buffer(self._output, count)))
        return count == OUTPUT_CHUNK

    async def _next_event(self) -> None:
        await trio.lowlevel.wait_readable(self._event_fd.fileno())
        take_count(self._event_fd.fileno())

    async def _join(self) -> None:
        lib.vm_stop(self._pointer)
        while lib.vm_running(self._pointer):
            await self._next_event()
        lib.vm_join(self._pointer)

    def _end(self) -> VmEnd | None:
        raw = ffi.new("struct vm_end *")
        lib.vm_read_end(self._pointer, raw)
        return None if raw.kind == lib.VM_END_NONE else describe_end(raw)

    def stop(self) -> None:
        """End the run: ``run`` returns. From the event loop's thread; harmless when it does not run."""
        if self._busy:
            self._stop_wanted = True
            os.eventfd_write(self._event_fd.fileno(), 1)

    def stats(self) -> VmStats:
        raw = ffi.new("struct vm_stats *")
        lib.vm_read_stats(self._pointer, raw)
        return VmStats(
            exits=raw.exits,
            handed_over=raw.handed_over,
            served=raw.served,
            stray_notifies=raw.stray_notifies,
            pio=raw.pio,
            unknown_mmio=raw.unknown_mmio,
            unknown_pio=raw.unknown_pio,
            refused_hypercalls=raw.refused_hypercalls,
            output_dropped=raw.output_dropped,
        )

    def close(self) -> None:
        """Not while it runs. Registrations are gone with the VM."""
        if self._busy:
            raise RuntimeError("the VM runs")
        if self._pointer is not None:
            self._doorbells.close()
        self._free()

    def _free(self) -> None:
        if self._pointer is not None:
            lib.vm_free(self._pointer)
            self._pointer = None
        self._event_fd.close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _raw_entries(entries: tuple[CpuidEntry, ...]) -> Any:
    raw = ffi.new("struct cpuid_entry[]", len(entries))
    for place, entry in zip(raw, entries, strict=True):
        place.leaf, place.subleaf, place.flags = entry.leaf, entry.subleaf, entry.flags
        place.eax, place.ebx, place.ecx, place.edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    return raw
