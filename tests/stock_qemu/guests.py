"""Virtual machines for the library under test: what they are given, and what is reported of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kit.kvm.process import KvmProcess, Peer

from transports.hypercall import HIDDEN_PV_BITS
from transports.stock_qemu.messages import Message, Type, VmFlag

KEY: Final = 0x5A17C3
PORT: Final = 0x1090
BELL: Final = PORT << 8

Leaf = list[int]
VENDOR: Final[Leaf] = [0, 1, 0, 0, 0]
PLAIN: Final[Leaf] = [1, 0, 0, 0, 0]
HYPERV: Final[list[Leaf]] = [
    [0x40000000, 0x40000005, 0x7263694D, 0x666F736F, 0x76482074],
    [0x40000001, 0x31237648, 0, 0, 0],
]
PV_FEATURES: Final = 0x01007AFB | sum(1 << bit for bit in HIDDEN_PV_BITS)
KVM_LEAVES: Final[list[Leaf]] = [
    [0x40000100, 0x40000101, 0x4B4D564B, 0x564B4D56, 0x4D],
    [0x40000101, PV_FEATURES, 0, 0, 0],
]
UNCHANGED: Final = [*HYPERV, *KVM_LEAVES]
ORDINARY: Final = [VENDOR, PLAIN, *UNCHANGED]

Start = Callable[..., KvmProcess]


def started(program: KvmProcess) -> int:
    """A VM with one vCPU that has ordinary leaves."""
    vm: int = program.create_vm()
    program.set_cpuid(program.create_vcpu(vm, 0), ORDINARY)
    return vm


def seen(program: KvmProcess, vcpu: int) -> list[Leaf]:
    """The hypervisor leaves that KVM was given; the others it may change as it likes."""
    return hypervisor(program.get_cpuid(vcpu))


def hypervisor(leaves: list[Leaf]) -> list[Leaf]:
    return [leaf for leaf in leaves if 0x40000000 <= leaf[0] < 0x40010000]


def shown(peer: Peer) -> Message:
    """What the library tells of its VM, as soon as it has given the guest the leaf."""
    while True:
        message = peer.expect(Type.VM)
        if VmFlag.KEY_SHOWN in VmFlag(message.flags) or message.result:
            return message


def bell(program: KvmProcess, vm: int, peer: Peer, port: int = PORT) -> tuple[int, Message]:
    """A doorbell of the VM: the program's eventfd, and what was reported."""
    fd = program.eventfd()
    program.ioeventfd(vm, port, 0, fd)
    return fd, peer.expect(Type.BELL)
