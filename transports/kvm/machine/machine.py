"""A virtual machine with devices: a list of back ends becomes virtio-mmio devices in a guest without QEMU."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
import trio

from transports.base import BackendLike
from transports.hypercall import Policy
from transports.kvm.cpu.cpuid import PlatformKey
from transports.kvm.host import KVM_PATH, Kvm
from transports.kvm.machine.device import HypercallOffer, MmioDevice
from transports.kvm.machine.hypercalls import HypervEventfds
from transports.kvm.machine.slots import DEVICES_MAX, gsi_of, slot
from transports.kvm.machine.state import MachineState
from transports.kvm.machine.strays import Source, StrayWatch
from transports.kvm.vm.ending import VmEnd
from transports.kvm.vm.entry import Entry
from transports.kvm.vm.ram import GuestRam
from transports.kvm.vm.vmm import Access, OnOutput, Vm, VmSetup
from virtio.errors import HostError

__all__ = ["DeviceSetup", "Machine", "MachineSetup", "gsi_of", "open_machine"]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class MachineSetup:
    """``hypercall_key``: the VM's 24-bit key; with it the guest's CPUID has the platform key, and devices may offer the
    hypercall doorbell. ``nested``: the guest may be a hypervisor itself."""

    ram_size: int
    vcpus: int = 1
    nested: bool = False
    hypercall_key: int | None = None
    kvm_path: str = KVM_PATH


@dataclass(frozen=True, slots=True)
class DeviceSetup:
    """A back end, which stays the caller's, and its policy for the hypercall doorbell."""

    backend: BackendLike
    hypercall: Policy = "offer"


class Machine:
    """Made by ``open_machine``; put something into ``ram``, then ``run``."""

    def __init__(self, ram: GuestRam, vm: Vm, devices: Sequence[MmioDevice]) -> None:
        self.ram = ram
        self.vm = vm
        self.devices = tuple(devices)
        self.strays = StrayWatch(
            [
                *(_strays_of(device) for device in devices),
                Source("hypercalls of unknown connection ids", lambda: vm.stats().refused_hypercalls),
            ]
        )

    async def run(self, entry: Entry, on_output: OnOutput) -> VmEnd:
        """Run the guest to its end, and say how it ended. The devices are as it left them."""
        try:
            return await self.vm.run(entry, self._on_access, on_output)
        finally:
            self.strays.look(last=True)

    def state(self) -> MachineState:
        """What is shown of it, beside its devices."""
        stats, key_shown = self.vm.stats(), self.vm.setup.platform is not None
        return MachineState(
            key_shown=key_shown,
            reason=(self.vm.why_no_hypercall or "") if key_shown else "it was given no key",
            refused_hypercalls=stats.refused_hypercalls,
            unknown_memory=stats.unknown_mmio,
            unknown_ports=stats.unknown_pio,
        )

    async def _on_access(self, access: Access) -> int:
        return await self.devices[access.window.index].answer(access)


@asynccontextmanager
async def open_machine(setup: MachineSetup, devices: Sequence[DeviceSetup]) -> AsyncIterator[Machine]:
    """Device n of ``devices`` is at ``slots.slot(n)``. Raises ``HostError``."""
    if len(devices) > DEVICES_MAX:
        raise HostError(f"{len(devices)} devices: a VM of ours has interrupts for {DEVICES_MAX}")
    async with AsyncExitStack() as stack:
        ram = stack.enter_context(GuestRam(setup.ram_size))
        platform = _platform_key(setup)
        vm = stack.enter_context(Vm(VmSetup(ram, setup.vcpus, setup.nested, platform, setup.kvm_path)))
        hypercalls = HypercallOffer(HypervEventfds(vm), setup.hypercall_key, vm.guest_may_nest)
        made = [
            await stack.enter_async_context(
                MmioDevice(vm, ram, slot(index), device.backend, hypercalls, device.hypercall)
            )
            for index, device in enumerate(devices)
        ]
        nursery = await stack.enter_async_context(trio.open_nursery())
        for device in made:
            nursery.start_soon(device.serve)
        machine = Machine(ram, vm, made)
        nursery.start_soon(machine.strays.run)
        try:
            yield machine
        finally:
            nursery.cancel_scope.cancel()


def _strays_of(device: MmioDevice) -> Source:
    return Source("doorbells of queues that do not exist", lambda: device.window.stray_notifies, device.backend.name)


def _platform_key(setup: MachineSetup) -> PlatformKey | None:
    """The leaf, which cannot change any more once the guest runs, offers only what this host has."""
    if setup.hypercall_key is None:
        return None
    with Kvm.open(setup.kvm_path) as kvm:
        why_not = kvm.why_no_hypercall
    if why_not is not None:
        log.warning("no hypercall doorbells, the plain ones go on", why=why_not)
    return PlatformKey(setup.hypercall_key, offered=why_not is None)
