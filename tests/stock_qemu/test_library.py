"""What the preload library is to its process, and the platform key: on this machine's real KVM."""

from __future__ import annotations

import errno
import os
import select
import signal
from pathlib import Path
from typing import Final

import pytest
from kit.kvm.process import KvmProcess, Listener
from stock_qemu.guests import (
    BELL,
    HYPERV,
    KEY,
    KVM_LEAVES,
    ORDINARY,
    PLAIN,
    PV_FEATURES,
    UNCHANGED,
    VENDOR,
    Leaf,
    Start,
    bell,
    seen,
    shown,
    started,
)

from transports.hypercall import HIDDEN_PV_BITS, platform_leaves
from transports.stock_qemu.library import VARIABLE_KEY, VARIABLE_NAME, VARIABLE_SOCKET, library_path
from transports.stock_qemu.messages import Reason, Type, VmFlag

# What the library is to its process


def test_it_does_nothing_before_there_is_a_vm(listener: Listener, start: Start) -> None:
    program = start()
    assert program.environment(VARIABLE_SOCKET) == str(listener.path)
    assert str(library_path()) in program.environment("LD_PRELOAD")
    assert "hyperbell" not in program.threads()
    assert not select.select([listener.socket], [], [], 0)[0]


def test_it_takes_itself_and_its_variables_out_of_the_environment_and_leaves_the_rest(
    listener: Listener, start: Start, fake: Path
) -> None:
    program = start()
    program.create_vm()
    assert program.environment("LD_PRELOAD") == str(fake)
    assert [program.environment(name) for name in (VARIABLE_SOCKET, VARIABLE_KEY, VARIABLE_NAME)] == [None] * 3
    assert program.environment("PATH") == os.environ["PATH"]


def test_a_child_process_is_not_preloaded(listener: Listener, start: Start) -> None:
    program = start()
    asked = f"grep -q {library_path().name} /proc/self/maps"
    assert program.shell(asked) == 0
    program.create_vm()
    assert program.shell(asked) == 1


def test_an_environment_with_nothing_else_preloaded_has_no_ld_preload_afterwards(
    path: Path, listener: Listener, kvm: None
) -> None:
    with KvmProcess({VARIABLE_SOCKET: str(path)}) as program:
        program.create_vm()
        assert program.environment("LD_PRELOAD") is None


def test_every_descriptor_it_opens_is_closed_on_exec(listener: Listener, start: Start) -> None:
    program = start()
    before = program.descriptors()
    vm = started(program)
    peer = listener.accept()
    bell(program, vm, peer)
    opened = {fd: flags for fd, flags in program.descriptors().items() if fd not in before}
    # VM, vCPU, eventfd; the library's: wake-up, socket, statistics, and the eventfd's duplicate.
    assert len(opened) == 7
    assert [fd for fd, flags in opened.items() if not flags & os.O_CLOEXEC] == []


def test_its_thread_takes_no_signal(listener: Listener, start: Start) -> None:
    program = start()
    program.create_vm()
    listener.accept()
    blocked = int(program.threads()["hyperbell"], 16)
    never = {signal.SIGKILL, signal.SIGSTOP, 32, 33}  # the kernel's, and the C library's own
    assert {number for number in range(1, 65) if not blocked >> (number - 1) & 1} <= never


def test_without_a_socket_it_is_not_there(kvm: None, fake: Path) -> None:
    with KvmProcess({}, fake) as program:
        vm = started(program)
        vcpu = program.create_vcpu(vm, 1)
        program.set_cpuid(vcpu, ORDINARY)
        assert seen(program, vcpu) == UNCHANGED
        assert "hyperbell" not in program.threads()
        assert "HYPERBELL_SOCKET names no socket" in program.end()


def test_a_path_that_no_socket_has_is_named_with_its_limit(kvm: None, fake: Path) -> None:
    path = "/run/" + "x" * 103
    with KvmProcess({VARIABLE_SOCKET: path}, fake) as program:
        started(program)
        assert "hyperbell" not in program.threads()
        complaint = program.end()
    assert "HYPERBELL_SOCKET is 108 bytes long, the path of a Unix socket has room for 107" in complaint
    assert path in complaint


def test_a_full_pipe_of_complaints_that_nobody_reads_holds_up_nobody(listener: Listener, start: Start) -> None:
    program = start()
    vcpu = program.create_vcpu(program.create_vm(), 0)
    assert program.shell("dd if=/dev/zero of=/proc/$PPID/fd/2 oflag=nonblock bs=4096 count=256 2>/dev/null") == 1
    program.set_cpuid(vcpu, [VENDOR, PLAIN, *KVM_LEAVES])  # about which there is something to say
    assert shown(listener.accept()).result == Reason.NO_HYPERV
    assert "hv-relaxed" not in program.end()


# Rule 2: the platform key


def test_every_vcpu_is_given_the_platform_leaf_and_no_pv_bits(listener: Listener, start: Start) -> None:
    program = start()
    vm = program.create_vm()
    base, features = platform_leaves(0x40000200, KEY, offered=True)
    expected = [
        *HYPERV,
        KVM_LEAVES[0],
        [0x40000101, PV_FEATURES & ~sum(1 << bit for bit in HIDDEN_PV_BITS), 0, 0, 0],
        [base.function, base.eax, base.ebx, base.ecx, base.edx],
        [features.function, features.eax, features.ebx, features.ecx, features.edx],
    ]
    for number in range(3):  # as QEMU does at its start, and when a vCPU is plugged in later
        vcpu = program.create_vcpu(vm, number)
        assert program.set_cpuid(vcpu, ORDINARY) == ORDINARY  # the caller's array is as it was
        assert seen(program, vcpu) == expected
    message = shown(listener.accept())
    assert message.name == "web1"
    assert message.flags == VmFlag.KEY_SHOWN | VmFlag.KEY_STABLE | VmFlag.CPUID_SEEN | VmFlag.HYPERV


def test_the_leaf_stands_at_the_first_free_multiple(listener: Listener, start: Start) -> None:
    program = start()
    vcpu = program.create_vcpu(program.create_vm(), 0)
    program.set_cpuid(vcpu, [*ORDINARY, [0x40000201, 7, 7, 7, 7]])
    assert [leaf[0] for leaf in seen(program, vcpu)[-2:]] == [0x40000300, 0x40000301]


@pytest.mark.parametrize("leaf", [[1, 0, 0, 1 << 5, 0], [0x80000001, 0, 0, 1 << 2, 0]], ids=["vmx", "svm"])
def test_a_guest_that_can_be_a_hypervisor_is_reported_as_such(listener: Listener, start: Start, leaf: Leaf) -> None:
    program = start()
    others = [one for one in ORDINARY if one[0] != leaf[0]]
    program.set_cpuid(program.create_vcpu(program.create_vm(), 0), [*others, leaf])
    assert VmFlag.MAY_NEST in VmFlag(shown(listener.accept()).flags)


def test_a_guest_without_hyperv_gets_nothing_and_the_operator_is_told_once(listener: Listener, start: Start) -> None:
    program = start()
    vm = program.create_vm()
    plain = [VENDOR, PLAIN, *KVM_LEAVES]
    for number in range(2):
        vcpu = program.create_vcpu(vm, number)
        program.set_cpuid(vcpu, plain)
        assert seen(program, vcpu) == KVM_LEAVES
    assert shown(listener.accept()).result == Reason.NO_HYPERV
    assert program.end().count("add hv-relaxed to -cpu") == 1


def test_a_full_table_of_leaves_goes_in_unchanged_and_the_vm_has_no_ids(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    shown(peer)
    _, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result == 0
    full = [*ORDINARY, *([0x80000000 + number, 0, 0, 0, 0] for number in range(255 - len(ORDINARY)))]
    vcpu = program.create_vcpu(vm, 1)
    program.set_cpuid(vcpu, full)  # 255 leaves; KVM takes 256, and ours are two
    assert seen(program, vcpu) == UNCHANGED
    assert program.ids() == []
    assert peer.expect(Type.VM).result == Reason.CPUID_REFUSED
    assert peer.expect(Type.BELL).flags == 0
    assert peer.order(Type.REGISTER, reported).result != 0
    assert program.ids() == []
    assert "table of CPUID leaves is full" in program.end()


def test_a_vcpu_keeps_its_leaf_when_the_vm_loses_its_ids(listener: Listener, start: Start) -> None:
    """KVM refuses other leaves once the vCPU has run, and QEMU gives them again when one is plugged in again."""
    program = start()
    vm = program.create_vm()
    first, second = program.create_vcpu(vm, 0), program.create_vcpu(vm, 1)
    program.set_cpuid(first, ORDINARY)
    given = seen(program, first)
    program.set_cpuid(second, [*ORDINARY, *([0x80000000 + number, 0, 0, 0, 0] for number in range(250))])
    assert seen(program, second) == UNCHANGED
    program.set_cpuid(first, ORDINARY)
    assert seen(program, first) == given != UNCHANGED
    program.set_cpuid(second, ORDINARY)
    assert seen(program, second) == UNCHANGED
    peer = listener.accept()
    message = peer.expect(Type.VM)
    while message.result != Reason.CPUID_REFUSED:
        message = peer.expect(Type.VM)
    assert VmFlag.KEY_SHOWN not in VmFlag(message.flags)


def test_what_kvm_refuses_from_the_program_itself_is_refused_as_ever(listener: Listener, start: Start) -> None:
    program = start()
    vcpu = program.create_vcpu(program.create_vm(), 0)
    with pytest.raises(OSError, match="E2BIG"):
        program.set_cpuid(vcpu, [*ORDINARY, *([0x80000000 + number, 0, 0, 0, 0] for number in range(300))])
    program.set_cpuid(vcpu, ORDINARY)
    assert not shown(listener.accept()).result


def test_a_key_nobody_gave_is_drawn_anew_for_every_vm(listener: Listener, start: Start) -> None:
    keys = set()
    for _ in range(2):
        program = start(key=None)
        vcpu = program.create_vcpu(program.create_vm(), 0)
        program.set_cpuid(vcpu, ORDINARY)
        keys.add(seen(program, vcpu)[-1][2])
        assert VmFlag.KEY_STABLE not in VmFlag(shown(listener.accept()).flags)
    assert len(keys) == 2
    assert all(0 < key <= 0xFFFFFF for key in keys)


@pytest.mark.parametrize("key", ["0", "1000000", "xyz", "-1", " 12", "0x12", ""])
def test_a_key_that_is_none_gives_no_key(listener: Listener, start: Start, key: str) -> None:
    program = start(key=key)
    vcpu = program.create_vcpu(program.create_vm(), 0)
    program.set_cpuid(vcpu, ORDINARY)
    assert seen(program, vcpu) == UNCHANGED
    assert shown(listener.accept()).result == Reason.NO_KEY


@pytest.mark.parametrize("option", ["-incoming", "--incoming", "-loadvm", "--loadvm"])
def test_a_vm_from_elsewhere_has_ids_only_with_a_stable_key(listener: Listener, start: Start, option: str) -> None:
    program = start(option, "defer", key=None)
    vcpu = program.create_vcpu(program.create_vm(), 0)
    program.set_cpuid(vcpu, ORDINARY)
    assert seen(program, vcpu) == UNCHANGED
    message = shown(listener.accept())
    assert (message.result, VmFlag(message.flags) & VmFlag.INCOMING) == (Reason.INCOMING, VmFlag.INCOMING)
    program = start(option, "defer")
    vm = started(program)
    peer = listener.accept()
    assert not shown(peer).result
    _, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result == 0


GUEST_OS_ID: Final = 0x40000000
RESTORED: Final = [[0x10, 1 << 40], [GUEST_OS_ID, 0x8100_0601_0000_0000]]


def test_a_vm_that_loads_a_snapshot_later_loses_its_drawn_key_before_it_runs(listener: Listener, start: Start) -> None:
    """By the monitor: the command line says nothing of it. The guest may remember another process's key."""
    program = start(key=None)
    vm = program.create_vm()
    vcpu = program.create_vcpu(vm, 0)
    program.set_cpuid(vcpu, ORDINARY)
    peer = listener.accept()
    assert not shown(peer).result
    _, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result == 0
    program.set_msrs(vcpu, [[0x10, 0], [GUEST_OS_ID, 0]])  # as QEMU does when the machine is reset
    assert len(program.ids()) == 1
    program.set_msrs(vcpu, RESTORED)
    assert program.ids() == []
    message = peer.expect(Type.VM)
    assert (message.result, VmFlag(message.flags) & VmFlag.INCOMING) == (Reason.INCOMING, VmFlag.INCOMING)
    assert VmFlag.KEY_SHOWN not in VmFlag(message.flags)
    assert peer.order(Type.REGISTER, reported).result == errno.EPERM
    program.set_msrs(vcpu, [[GUEST_OS_ID, 0]])
    assert peer.order(Type.REGISTER, reported).result == errno.EPERM  # for good
    assert program.end().count("needs the key it had there") == 1


def test_a_vm_that_loads_a_snapshot_later_keeps_the_key_it_was_given(listener: Listener, start: Start) -> None:
    program = start()
    vm = program.create_vm()
    vcpu = program.create_vcpu(vm, 0)
    program.set_cpuid(vcpu, ORDINARY)
    peer = listener.accept()
    _, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result == 0
    program.set_msrs(vcpu, RESTORED)
    assert program.ids() == [BELL ^ KEY]
    message = peer.expect(Type.VM)
    assert (message.result, VmFlag(message.flags) & VmFlag.INCOMING) == (Reason.NONE, VmFlag.INCOMING)
    assert program.end() == ""


def test_a_kvm_without_the_capability_is_left_alone(listener: Listener, start: Start) -> None:
    """This machine's own, unless it is a mainline KVM with Hyper-V."""
    program = start(capable=False)
    vcpu = program.create_vcpu(program.create_vm(), 0)
    program.set_cpuid(vcpu, ORDINARY)
    message = shown(listener.accept())
    if message.result != Reason.NO_CAPABILITY:
        pytest.skip("KVM here has KVM_HYPERV_EVENTFD: nothing to be missing")
    assert seen(program, vcpu) == UNCHANGED
    assert "KVM on this host has no KVM_HYPERV_EVENTFD" in program.end()
