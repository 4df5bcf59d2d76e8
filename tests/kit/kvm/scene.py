"""A device of our own VM without a VM: KVM is played by a double, the guest by the driver's side of a ring.

The double does what KVM does with eventfds (it signals them) and keeps a list of what was asked of it, in order.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import kit.guest.mmio as regs
import trio

from transports.hypercall import Policy
from transports.kvm.machine.device import HypercallOffer, MmioDevice
from transports.kvm.machine.slots import slot
from transports.kvm.vm.vmm import Access
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.testing.driver import GuestMemory, PackedDriver, SplitDriver, Used, VirtqueueDriver

GUARD: Final = 20.0
KEY: Final = 0x5A5A5A


class Registered:
    """What ``Vm`` gives back."""

    def __init__(self, calls: list[tuple[Any, ...]], *what: Any) -> None:
        self._calls = calls
        self._what = what

    def remove(self) -> None:
        self._calls.append(("remove", *self._what))


class FakeWindow:
    def __init__(self, index: int, gpa: int, interrupt_status: object) -> None:
        self.index, self.gpa = index, gpa
        self.interrupt_status = interrupt_status
        self.kicks: dict[int, int] = {}
        self.stray_notifies = 0

    def set_kick(self, queue_index: int, fd: OwnedFd | None) -> None:
        assert fd is not None
        self.kicks[queue_index] = fd.fileno()


@dataclass
class FakeVm:
    """KVM's half: ``ring`` and the like signal what was registered."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    mmio: dict[int | None, int] = field(default_factory=dict)
    pio: dict[int, int] = field(default_factory=dict)
    irq: int = -1

    def ioeventfd_mmio(self, gpa: int, length: int, datamatch: int | None, fd: OwnedFd) -> Registered:
        self.calls.append(("mmio", gpa, length, datamatch))
        self.mmio[datamatch] = fd.fileno()
        return Registered(self.calls, "mmio", datamatch)

    def ioeventfd_pio(self, port: int, length: int, datamatch: int | None, fd: OwnedFd) -> Registered:
        self.calls.append(("pio", port, length, datamatch))
        assert datamatch is not None
        self.pio[datamatch] = fd.fileno()
        return Registered(self.calls, "pio", datamatch)

    def irqfd(self, gsi: int, fd: OwnedFd) -> Registered:
        self.calls.append(("irqfd", gsi))
        self.irq = fd.fileno()
        return Registered(self.calls, "irqfd", gsi)

    def add_window(self, gpa: int, size: int, *, interrupt_status: object, notify_port: int | None) -> FakeWindow:
        self.calls.append(("window", gpa, size, notify_port))
        return FakeWindow(0, gpa, interrupt_status)


class FakeHypercalls:
    """KVM_HYPERV_EVENTFD: ``ring`` is the guest's hypercall, and answers with its status."""

    def __init__(self) -> None:
        self.why_not: str | None = None
        self.registered: dict[int, OwnedFd] = {}
        self.taken: set[int] = set()  # by somebody else
        self.calls: list[tuple[str, int]] = []
        self.refuses_to_withdraw = False

    def register(self, connection: int, fd: OwnedFd) -> None:
        self.calls.append(("register", connection))
        if connection in self.taken or connection in self.registered:
            raise HostError(f"connection id {connection:#x} is already taken", errno=errno.EEXIST)
        self.registered[connection] = fd.duplicate()

    def withdraw(self, connection: int) -> None:
        self.calls.append(("withdraw", connection))
        if self.refuses_to_withdraw:
            raise HostError("KVM does not let go", errno=errno.EIO)
        fd = self.registered.pop(connection, None)
        if fd is not None:
            fd.close()

    def ring(self, connection: int) -> int:
        fd = self.registered.get(connection)
        if fd is None:
            return 3
        os.eventfd_write(fd.fileno(), 1)
        return 0

    def close(self) -> None:
        for fd in self.registered.values():
            fd.close()


class Scene:
    """One device and the guest that drives it."""

    def __init__(self, device: MmioDevice, vm: FakeVm, hypercalls: FakeHypercalls, memory: GuestMemory) -> None:
        self.device = device
        self.vm = vm
        self.hypercalls = hypercalls
        self.memory = memory
        self.rings: list[VirtqueueDriver] = []

    # ---- registers ----

    async def read(self, offset: int, size: int = 4) -> int:
        return await self.device.answer(self._access(offset, size, False, 0))

    async def write(self, offset: int, value: int, size: int = 4) -> None:
        await self.device.answer(self._access(offset, size, True, value))

    def _access(self, offset: int, size: int, is_write: bool, data: int) -> Access:
        window: Any = self.device.window
        return Access(window=window, vcpu=0, offset=offset, length=size, is_write=is_write, data=data)

    # ---- a driver ----

    async def negotiate(self, features: int) -> None:
        await self.write(regs.STATUS, 0)
        assert await self.read(regs.STATUS) == 0
        await self.choose(features)

    async def choose(self, features: int) -> None:
        """What is left of it after a reset."""
        await self.write(regs.STATUS, regs.ACKNOWLEDGE | regs.DRIVER)
        for word in (0, 1):
            await self.write(regs.DRIVER_FEATURES_SEL, word)
            await self.write(regs.DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)
        await self.write(regs.STATUS, regs.ACKNOWLEDGE | regs.DRIVER | regs.FEATURES_OK)
        assert await self.read(regs.STATUS) & regs.FEATURES_OK

    async def set_up(self, index: int, ring: VirtqueueDriver) -> None:
        await self.write(regs.QUEUE_SEL, index)
        await self.write(regs.QUEUE_NUM, ring.size)
        for register, address in zip(regs.AREAS, (ring.desc, ring.avail, ring.used_area), strict=True):
            await self.write(register, address & 0xFFFF_FFFF)
            await self.write(register + 4, address >> 32)
        await self.write(regs.QUEUE_READY, 1)

    async def start(self, features: int = regs.F_VERSION_1, size: int = 64) -> None:
        """All queues, up to DRIVER_OK."""
        self.rings = []
        await self.negotiate(features)
        for index in range(self.device.backend.queue_count):
            format_class = PackedDriver if features & regs.F_RING_PACKED else SplitDriver
            self.rings.append(format_class(self.memory, size, event_idx=False))
            await self.set_up(index, self.rings[index])
            assert await self.read(regs.QUEUE_READY) == 1
        await self.write(regs.STATUS, await self.read(regs.STATUS) | regs.DRIVER_OK)

    def ring_mmio(self, index: int) -> None:
        """A store to QueueNotify, as KVM serves it."""
        fd = self.vm.mmio.get(index, self.vm.mmio.get(None, -1))
        os.eventfd_write(fd, 1)

    def ring_pio(self, index: int) -> None:
        os.eventfd_write(self.vm.pio[index], 1)

    async def ids(self) -> list[int]:
        """The connection id of each queue, as a driver makes it; 0: withheld."""
        key, found = await self.read(regs.KEY), []
        for index in range(len(self.rings)):
            await self.write(regs.QUEUE_SEL, index)
            bell = await self.read(regs.BELL)
            found.append(bell ^ key if bell else 0)
        return found

    async def interrupted(self) -> int:
        """Wait for an interrupt; InterruptStatus, which is acknowledged."""
        with trio.fail_after(GUARD):
            await trio.lowlevel.wait_readable(self.vm.irq)
        os.eventfd_read(self.vm.irq)
        status = self.device.interrupt.value
        self.device.interrupt.acknowledge(status)
        return status

    async def used(self, index: int, count: int = 1) -> list[Used]:
        ring = self.rings[index]
        back: list[Used] = []
        while len(back) < count:
            back += ring.used()
            if len(back) < count and not ring.want_interrupts(True):
                await self.interrupted()
        return back

    async def rung(self, index: int = 0, **kinds: int) -> None:
        """Wait until the queue was rung exactly so often, by kind: a count is read some time after its work is done."""
        backend: Any = self.device.backend
        with trio.fail_after(GUARD):
            while True:
                counts = backend.stats().queues[index].doorbells
                assert all(count <= kinds.get(kind, 0) for kind, count in counts.items()), counts
                if all(counts[kind] == count for kind, count in kinds.items()):
                    return
                await trio.lowlevel.checkpoint()


@contextlib.asynccontextmanager
async def scene(
    backend: Any, *, policy: Policy = "offer", key: int | None = KEY, number: int = 0
) -> AsyncIterator[Scene]:
    """``backend`` as device ``number`` of a VM whose host can do hypercalls, its events being served."""
    vm, hypercalls = FakeVm(), FakeHypercalls()
    with GuestMemory(4 << 20, gpa=0) as memory, OwnedFd(os.dup(memory.fd)) as fd:
        memory.allocate(4096)  # a driver of ours never has a ring at address 0
        ram: Any = SimpleNamespace(size=memory.size, fd=fd)
        offer = HypercallOffer(hypercalls, key, guest_may_nest=False)
        machine: Any = vm
        try:
            async with (
                MmioDevice(machine, ram, slot(number), backend, offer, policy) as device,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(device.serve)
                yield Scene(device, vm, hypercalls, memory)
                nursery.cancel_scope.cancel()
        finally:
            hypercalls.close()
