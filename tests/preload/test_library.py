"""The preload library in programs that make real virtual machines on this machine's KVM."""

from __future__ import annotations

import os
import select
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from kvm_process import KvmProcess, Listener, Peer

from transports.hypercall import HIDDEN_PV_BITS, platform_leaves
from transports.preload import VARIABLE_KEY, VARIABLE_NAME, VARIABLE_SOCKET, library_path
from transports.qemu_doorbells.descriptors import VcpuStatistics
from transports.qemu_doorbells.messages import WIRE_BELL_REGISTERED, WIRE_MAGIC, Message, Reason, Type, VmFlag

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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hypercall.sock"


@pytest.fixture
def listener(path: Path) -> Iterator[Listener]:
    with Listener(path) as listener:
        yield listener


@pytest.fixture
def start(path: Path, fake: Path) -> Iterator[Start]:
    """Start a program with the library on a KVM that can; ended with the test."""
    with ExitStack() as stack:

        def run(*arguments: str, key: str | None = f"{KEY:06x}", capable: bool = True, **variables: str) -> KvmProcess:
            given = {VARIABLE_SOCKET: str(path), VARIABLE_NAME: "web1", **variables}
            if key is not None:
                given[VARIABLE_KEY] = key
            return stack.enter_context(KvmProcess(given, fake if capable else None, arguments))

        yield run


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
