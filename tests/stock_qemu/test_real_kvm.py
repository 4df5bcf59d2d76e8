"""The library on a KVM that has KVM_HYPERV_EVENTFD itself: nothing beneath it, errors and ids are the kernel's own.

Machines without such a KVM run these inside an emulated host, by tests/nested/test_stock_qemu.py.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kit.kvm.process import KvmProcess, Listener, Peer
from stock_qemu.guests import BELL, KEY, ORDINARY, PORT, UNCHANGED, bell, seen, shown, started

from transports.stock_qemu.library import VARIABLE_KEY, VARIABLE_SOCKET
from transports.stock_qemu.messages import Reason, Type

KVM_CHECK_EXTENSION = 0xAE03
KVM_CAP_HYPERV_EVENTFD = 154


@pytest.fixture
def program(listener: Listener, kvm: None) -> Iterator[KvmProcess]:
    with ExitStack() as stack:
        with Path("/dev/kvm").open("rb") as device:
            if not fcntl.ioctl(device, KVM_CHECK_EXTENSION, KVM_CAP_HYPERV_EVENTFD):
                pytest.skip("KVM here has no KVM_HYPERV_EVENTFD: only an emulated host can show this")
        variables = {VARIABLE_SOCKET: str(listener.path), VARIABLE_KEY: f"{KEY:06x}"}
        yield stack.enter_context(KvmProcess(variables))


def is_free(program: KvmProcess, vm: int, number: int) -> bool:
    """Whether KVM has no such id; it has one afterwards."""
    try:
        program.hyperv_eventfd(vm, number, program.eventfd())
    except OSError as error:
        if str(error) != "EEXIST":
            raise
        return False
    return True


def offered(program: KvmProcess, listener: Listener) -> tuple[int, Peer]:
    vm = started(program)
    peer = listener.accept()
    assert not shown(peer).result
    return vm, peer


def test_kvm_takes_the_id_and_the_leaf(program: KvmProcess, listener: Listener) -> None:
    vm, peer = offered(program, listener)
    vcpu = program.create_vcpu(vm, 1)
    program.set_cpuid(vcpu, ORDINARY)
    assert [leaf[0] for leaf in seen(program, vcpu)][-2:] == [0x40000200, 0x40000201]
    _, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result == 0
    assert not is_free(program, vm, BELL ^ KEY)


def test_kvm_has_no_id_any_more_when_the_doorbell_is_taken_away(program: KvmProcess, listener: Listener) -> None:
    vm, peer = offered(program, listener)
    fd, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result == 0
    program.ioeventfd(vm, PORT, 0, fd, 7)
    assert is_free(program, vm, BELL ^ KEY)


def test_kvm_has_no_id_any_more_when_it_is_withdrawn(program: KvmProcess, listener: Listener) -> None:
    vm, peer = offered(program, listener)
    _, reported = bell(program, vm, peer)
    peer.order(Type.REGISTER, reported)
    assert peer.order(Type.WITHDRAW, reported).result == 0
    assert is_free(program, vm, BELL ^ KEY)


def test_an_id_that_kvm_has_already_is_refused_and_stays_whose_it_was(program: KvmProcess, listener: Listener) -> None:
    vm, peer = offered(program, listener)
    assert is_free(program, vm, BELL ^ KEY)
    fd, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result == errno.EEXIST
    program.ioeventfd(vm, PORT, 0, fd, 7)
    assert not is_free(program, vm, BELL ^ KEY)


def test_a_table_of_leaves_that_kvm_finds_too_full_costs_the_ids(program: KvmProcess, listener: Listener) -> None:
    vm, peer = offered(program, listener)
    _, reported = bell(program, vm, peer)
    peer.order(Type.REGISTER, reported)
    full = [*ORDINARY, *([0x80000000 + number, 0, 0, 0, 0] for number in range(256 - len(ORDINARY)))]
    vcpu = program.create_vcpu(vm, 1)
    program.set_cpuid(vcpu, full)
    assert seen(program, vcpu) == UNCHANGED
    assert peer.expect(Type.VM).result == Reason.CPUID_REFUSED
    assert is_free(program, vm, BELL ^ KEY)
