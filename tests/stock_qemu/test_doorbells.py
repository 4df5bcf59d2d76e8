"""The doorbells that the preload library reports and registers, wherever the daemon may be: on a real KVM."""

from __future__ import annotations

import errno
import os
import resource
import struct
from pathlib import Path

import pytest
from kit.kvm.process import Listener
from stock_qemu.guests import BELL, KEY, ORDINARY, PORT, Start, bell, started

from transports.stock_qemu.descriptors import VcpuStatistics
from transports.stock_qemu.messages import WIRE_BELL_REGISTERED, WIRE_MAGIC, Message, Type, VmFlag

# Rule 3: the doorbells


def test_a_doorbell_is_reported_with_the_eventfd_itself(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    fd, reported = bell(program, vm, peer)
    assert (reported.bell, reported.flags) == (BELL, 0)
    os.eventfd_write(peer.fds[0].fileno(), 5)
    assert program.read_eventfd(fd) == 5


def test_what_is_no_doorbell_of_a_virtio_queue_is_not_reported(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    fd = program.eventfd()
    program.ioeventfd(vm, 0xFF, 0, fd)  # below every virtio device
    program.ioeventfd(vm, PORT, 256, fd)  # no queue has that index
    program.ioeventfd(vm, PORT, 0, fd, 3, 4)  # four bytes wide
    program.ioeventfd(vm, 0xFE000000, 0, fd, 1)  # memory
    program.ioeventfd(vm, PORT + 2, 0, fd, 2)  # any value
    program.ioeventfd(vm, 0xFFFF, 0xFF, fd)  # reserved
    _, reported = bell(program, vm, peer, PORT + 4)
    assert reported.bell == BELL + 0x400  # the first that came


def test_the_id_is_the_bell_hidden_by_the_key_and_rings_the_programs_own_eventfd(
    listener: Listener, start: Start
) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    fd, reported = bell(program, vm, peer)
    assert program.ids() == []  # until the daemon says so
    answer = peer.order(Type.REGISTER, reported)
    assert (answer.result, answer.flags, answer.serial) == (0, WIRE_BELL_REGISTERED, reported.serial)
    assert program.ids() == [BELL ^ KEY]
    assert program.ring(vm, BELL ^ KEY) == 0
    assert program.read_eventfd(fd) == 1
    answer = peer.order(Type.WITHDRAW, reported)
    assert (answer.result, answer.flags) == (0, 0)
    assert program.ring(vm, BELL ^ KEY) == 3


def test_a_doorbell_that_is_taken_away_takes_its_id_along_before_the_call_returns(
    listener: Listener, start: Start
) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    fd, reported = bell(program, vm, peer)
    peer.order(Type.REGISTER, reported)
    program.ioeventfd(vm, PORT, 0, fd, 7)
    assert program.ids() == []
    gone = peer.expect(Type.BELL_GONE)
    assert (gone.bell, gone.serial) == (reported.bell, reported.serial)


def test_an_order_for_a_doorbell_that_came_anew_since_is_not_carried_out(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    fd, old = bell(program, vm, peer)
    program.ioeventfd(vm, PORT, 0, fd, 7)
    _, new = bell(program, vm, peer)
    assert new.serial != old.serial
    peer.send(Message(Type.REGISTER, bell=old.bell, serial=old.serial))
    peer.send(Message(Type.REGISTER, bell=BELL + 1, serial=new.serial))  # one that never was
    _, other = bell(program, vm, peer, PORT + 4)
    assert peer.order(Type.REGISTER, other).bell == other.bell  # the first answer: the others had none
    assert program.ids() == [other.bell ^ KEY]


def test_an_id_that_somebody_else_has_is_answered_with_the_error(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    program.hyperv_eventfd(vm, BELL ^ KEY, program.eventfd())
    peer = listener.accept()
    fd, reported = bell(program, vm, peer)
    answer = peer.order(Type.REGISTER, reported)
    assert (answer.result, answer.flags) == (17, 0)  # EEXIST
    program.ioeventfd(vm, PORT, 0, fd, 7)
    assert program.ids() == [BELL ^ KEY]  # the other's stays


@pytest.mark.parametrize("error", [errno.ENOTTY, errno.EINVAL, errno.EPERM])
def test_a_kvm_that_has_the_capability_only_in_name_is_answered_with_its_error_and_all_else_goes_on(
    listener: Listener, start: Start, error: int
) -> None:
    program = start(FAKE_ERROR=str(error))
    vm = started(program)
    peer = listener.accept()
    fd, reported = bell(program, vm, peer)
    for kind in (Type.REGISTER, Type.REGISTER):
        answer = peer.order(kind, reported)
        assert (answer.result, answer.flags) == (error, 0)
    assert peer.order(Type.WITHDRAW, reported).result == 0  # there is nothing to be withdrawn
    assert program.calls() == 2
    assert program.ids() == []
    assert program.ring(vm, BELL ^ KEY) == 3  # the guest goes to its plain doorbell, which is there:
    with pytest.raises(OSError, match="EEXIST"):
        program.ioeventfd(vm, PORT, 0, program.eventfd())
    program.ioeventfd(vm, PORT, 0, fd, 7)
    assert peer.expect(Type.BELL_GONE).bell == BELL


def test_the_number_that_must_never_ring_is_no_id(listener: Listener, start: Start) -> None:
    program = start(key=f"{BELL ^ 0xFFFFFF:06x}")
    vm = started(program)
    peer = listener.accept()
    _, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result != 0
    assert program.ids() == []


def test_kvms_own_statistics_of_each_vcpu_are_handed_over(listener: Listener, start: Start) -> None:
    program = start()
    vm = program.create_vm()
    for number in (0, 5):
        program.create_vcpu(vm, number)
    peer = listener.accept()
    for number in (0, 5):
        assert peer.expect(Type.VCPU).vcpu == number
        statistics = VcpuStatistics(peer.fds.pop())
        assert statistics.hypercalls() == 0
        statistics.close()


def test_a_second_vm_in_the_place_of_the_first_has_a_connection_of_its_own(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    first = listener.accept()
    bell(program, vm, first)
    program.close(vm)
    assert program.create_vm() == vm  # the lowest number that is free
    second = listener.accept()
    assert second.receive().type == Type.VM
    assert first.socket.recv(100) == b"" or not first.is_silent()
    program.set_cpuid(program.create_vcpu(vm, 0), ORDINARY)
    fd, reported = bell(program, vm, second)
    assert second.order(Type.REGISTER, reported).result == 0
    assert program.ring(vm, BELL ^ KEY) == 0
    assert program.read_eventfd(fd) == 1


def test_the_last_quarter_of_the_descriptors_is_left_to_the_program(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    bell(program, vm, peer)
    own = program.eventfd()
    used = len(program.descriptors())
    pid, hard = program.process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 2, hard))
    program.ioeventfd(vm, PORT + 4, 0, own)  # the plain doorbell is there
    assert len(program.descriptors()) == used
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used * 4, hard))
    _, reported = bell(program, vm, peer, PORT + 8)
    assert reported.bell == BELL + 0x800
    assert "too few descriptors" in program.end()


# Rules 3 and 4: the daemon may be anywhere


def test_without_a_daemon_all_works_and_everything_is_reported_when_one_comes(path: Path, start: Start) -> None:
    program = start()
    vm = started(program)
    fd = program.eventfd()
    program.ioeventfd(vm, PORT, 0, fd)
    program.ioeventfd(vm, PORT + 4, 0, fd)
    program.ioeventfd(vm, PORT + 4, 0, fd, 7)
    with Listener(path) as listener:
        peer = listener.accept()
        message = peer.receive()
        assert (message.type, message.flags & VmFlag.KEY_SHOWN) == (Type.VM, VmFlag.KEY_SHOWN)
        assert peer.receive().type == Type.VCPU
        reported = peer.receive()
        assert (reported.type, reported.bell) == (Type.BELL, BELL)
        assert peer.order(Type.REGISTER, reported).result == 0


def test_ids_stay_when_the_daemon_ends_and_the_next_one_learns_of_them(path: Path, start: Start) -> None:
    program = start()
    with Listener(path) as listener:
        vm = started(program)
        peer = listener.accept()
        fd, reported = bell(program, vm, peer)
        peer.order(Type.REGISTER, reported)
    assert program.ring(vm, BELL ^ KEY) == 0
    assert program.read_eventfd(fd) == 1
    with Listener(path) as listener:
        peer = listener.accept()
        again = peer.expect(Type.BELL)
        assert (again.bell, again.serial, again.flags) == (BELL, reported.serial, WIRE_BELL_REGISTERED)
        assert program.ids() == [BELL ^ KEY]
        assert peer.order(Type.WITHDRAW, again).result == 0
        assert program.ids() == []


def test_a_doorbell_goes_with_its_id_though_there_is_no_daemon(path: Path, start: Start) -> None:
    program = start()
    with Listener(path) as listener:
        vm = started(program)
        peer = listener.accept()
        fd, reported = bell(program, vm, peer)
        peer.order(Type.REGISTER, reported)
    program.ioeventfd(vm, PORT, 0, fd, 7)
    assert program.ids() == []
    with Listener(path) as listener:
        peer = listener.accept()
        _, other = bell(program, vm, peer, PORT + 4)
        assert other.bell == BELL + 0x400  # the other is not spoken of


def test_a_daemon_that_reads_nothing_holds_up_nobody(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()  # and no more
    fd = program.eventfd()
    ports = [PORT + 4 * number for number in range(3)]
    program.shake_together(vm, ports, fd, 200)
    for port in ports:
        program.ioeventfd(vm, port, 0, fd)
    live: dict[int, int] = {}
    while len(live) < 3:
        message = peer.receive()
        if message.type == Type.BELL:
            live[message.bell] = message.serial
        elif message.type == Type.BELL_GONE:
            assert live.pop(message.bell) == message.serial
    assert sorted(live) == [port << 8 for port in ports]


@pytest.mark.parametrize(
    "nonsense",
    [b"x", b"x" * 64, b"x" * 100, *(struct.pack("<IHH56x", WIRE_MAGIC, *rest) for rest in ((9, 33), (1, 1)))],
    ids=["short", "strange", "long", "version", "type"],
)
def test_a_daemon_that_talks_nonsense_loses_the_connection_and_nothing_else(
    listener: Listener, start: Start, nonsense: bytes
) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    fd, reported = bell(program, vm, peer)
    peer.order(Type.REGISTER, reported)
    peer.socket.send(nonsense)
    again = listener.accept()
    assert again.expect(Type.BELL).flags == WIRE_BELL_REGISTERED
    assert program.ring(vm, BELL ^ KEY) == 0
    assert program.read_eventfd(fd) == 1


def test_descriptors_that_a_daemon_sends_are_not_kept(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    _, reported = bell(program, vm, peer)
    assert peer.order(Type.REGISTER, reported).result == 0
    before = program.descriptors().keys()
    order = Message(Type.REGISTER, bell=reported.bell, serial=reported.serial).build()
    with open(os.devnull, "rb") as file:  # noqa: PTH123
        rights = (1, 1, struct.pack("i", file.fileno()))  # SOL_SOCKET, SCM_RIGHTS
        peer.socket.sendmsg([order], [rights])
    assert peer.expect(Type.ANSWER).result == 0
    assert program.descriptors().keys() == before


def test_the_descriptors_it_holds_are_as_many_as_the_doorbells(listener: Listener, start: Start) -> None:
    program = start()
    vm = started(program)
    peer = listener.accept()
    fd, reported = bell(program, vm, peer)
    peer.order(Type.REGISTER, reported)
    before = len(program.descriptors())
    program.shake(vm, PORT + 4, fd, 50)
    assert len(program.descriptors()) == before
    program.ioeventfd(vm, PORT, 0, fd, 7)
    assert len(program.descriptors()) == before - 2  # the duplicate, and the one that stands for KVM's
