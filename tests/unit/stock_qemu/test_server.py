"""The socket where the preloaded libraries report: honest ones, hostile ones, and their descriptors."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from transports.stock_qemu import server
from transports.stock_qemu.descriptors import VcpuStatistics, doorbell_id
from transports.stock_qemu.messages import WIRE_SIZE, Message, Type, VmFlag
from transports.stock_qemu.vms import QemuDoorbells
from virtio.errors import PeerError
from virtio.fd import OwnedFd, eventfd_id
from virtio.socket_file import Listen, SocketFile

LIMIT: Final = 20  # seconds; only a failing run gets there
SHOWN: Final = VmFlag.KEY_SHOWN | VmFlag.CPUID_SEEN | VmFlag.HYPERV
BELL: Final = 0x109000
Connect = Callable[[], Awaitable[trio.socket.SocketType]]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def send(sock: trio.socket.SocketType, message: Message | bytes, *fds: int) -> None:
    data = message if isinstance(message, bytes) else message.build()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    await sock.sendmsg([data], rights)


async def receive(sock: trio.socket.SocketType) -> tuple[int, int, int]:
    """Type, bell and serial of what the daemon says."""
    data = await sock.recv(WIRE_SIZE + 1)
    assert len(data) == WIRE_SIZE
    kind, bell, serial = struct.unpack_from("<HII", data, 6)
    return kind, bell, serial


async def ended(sock: trio.socket.SocketType) -> None:
    """Wait until the daemon has closed the connection."""
    try:
        while await sock.recv(100):
            pass
    except ConnectionResetError:  # it had not read all
        pass
    sock.close()


@asynccontextmanager
async def serving(path: Path, doorbells: QemuDoorbells) -> AsyncIterator[Connect]:
    async def connect() -> trio.socket.SocketType:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        await sock.connect(str(path))
        return sock

    file = SocketFile(Listen(path, 0o600, None, socket.SOCK_SEQPACKET))
    try:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve, file.socket, doorbells)
                yield connect
                nursery.cancel_scope.cancel()
    finally:
        file.close()


@pytest.fixture
def doorbells() -> QemuDoorbells:
    doorbells = QemuDoorbells()
    doorbells.set_policy("disk", "offer")
    return doorbells


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hypercall.sock"


async def test_a_doorbell_is_a_queues_when_its_eventfd_is_the_queues_kick(path: Path, doorbells: QemuDoorbells) -> None:
    with OwnedFd(os.eventfd(0)) as kick, OwnedFd(os.eventfd(0)) as other:
        doorbells.kick_changed("disk", 3, eventfd_id(kick.fileno()))
        async with serving(path, doorbells) as connect:
            sock = await connect()
            await send(sock, Message(Type.VM, flags=SHOWN, name="web1"))
            assert await receive(sock) == (Type.WELCOME, 0, 0)
            await send(sock, Message(Type.BELL, bell=BELL + 1, serial=1), other.fileno())
            with kick.duplicate() as sent:
                await send(sock, Message(Type.BELL, bell=BELL, serial=2), sent.fileno())
            assert await receive(sock) == (Type.REGISTER, BELL, 2)
            await send(sock, Message(Type.ANSWER, bell=BELL, serial=2, flags=1))
            doorbells.set_policy("disk", "withhold")
            assert await receive(sock) == (Type.WITHDRAW, BELL, 2)
            (vm,) = doorbells.snapshot()
            assert (vm.name, vm.pid, vm.key_shown) == ("web1", os.getpid(), True)
            (bell,) = vm.bells
            assert (bell.bell, bell.device, bell.queue, bell.registered) == (BELL, "disk", 3, True)
            sock.close()
            await trio.testing.wait_all_tasks_blocked()
            assert doorbells.snapshot() == ()


async def test_a_library_that_connects_anew_keeps_its_name(path: Path, doorbells: QemuDoorbells) -> None:
    """Its new connection is heard before all has been read that it said in the old one."""
    hello = Message(Type.VM, flags=SHOWN, name="web1").build()
    async with serving(path, doorbells) as connect:
        first = await connect()
        await send(first, hello)
        assert await receive(first) == (Type.WELCOME, 0, 0)
        with socket.socket(fileno=first.detach()) as old:
            for _ in range(50):  # each is a turn of the loop's, so all the others come before the end is noticed
                old.send(hello)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as new:
            new.connect(str(path))
            new.send(hello)
            new.setblocking(False)
            await trio.lowlevel.wait_readable(new)
            assert [vm.name for vm in doorbells.snapshot()] == ["web1"]
            await trio.testing.wait_all_tasks_blocked()
            assert [vm.name for vm in doorbells.snapshot()] == ["web1"]
            other = await connect()  # which has the name of one that is still there
            await send(other, hello)
            assert await receive(other) == (Type.WELCOME, 0, 0)
            assert [vm.name for vm in doorbells.snapshot()] == ["web1", "vm0"]
            other.close()


HELLO: Final = Message(Type.VM, flags=SHOWN)
HOSTILE: Final[dict[str, list[tuple[Message | bytes, int]]]] = {
    "half a message": [(HELLO.build()[:30], 0)],
    "too long a message": [(HELLO.build() + b"x", 0)],
    "a message of ours": [(HELLO, 0), (Message(Type.REGISTER), 0)],
    "an eventfd with a message that has none": [(HELLO, 1)],
    "two eventfds": [(HELLO, 0), (Message(Type.BELL), 2)],
    "five eventfds": [(HELLO, 0), (Message(Type.BELL), 5)],
    "no eventfd": [(HELLO, 0), (Message(Type.BELL), 0)],
    "a doorbell first": [(Message(Type.BELL), 1)],
    "a vcpu first": [(Message(Type.VCPU), 1)],
    "statistics that are an eventfd": [(HELLO, 0), (Message(Type.VCPU), 1)],
    "an answer to nothing": [(HELLO, 0), (Message(Type.ANSWER), 0)],
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_library_ends_its_own_connection_and_leaves_nothing(
    path: Path, doorbells: QemuDoorbells, case: str
) -> None:
    with OwnedFd(os.eventfd(0)) as eventfd, capture_logs() as logs:
        async with serving(path, doorbells) as connect:
            honest = await connect()
            await send(honest, HELLO)
            assert await receive(honest) == (Type.WELCOME, 0, 0)
            before = open_descriptors()
            hostile = await connect()
            for message, fds in HOSTILE[case]:
                await send(hostile, message, *[eventfd.fileno()] * fds)
            await ended(hostile)
            await trio.testing.wait_all_tasks_blocked()
            assert open_descriptors() == before
            assert "it broke the protocol" in logs[-1]["event"]
            assert len(doorbells.snapshot()) == 1
            doorbells.kick_changed("disk", 0, eventfd_id(eventfd.fileno()))
            await send(honest, Message(Type.BELL, bell=BELL, serial=1), eventfd.fileno())
            assert await receive(honest) == (Type.REGISTER, BELL, 1)
            honest.close()


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
async def test_a_doorbell_that_is_no_eventfd_is_not_even_read(
    path: Path, doorbells: QemuDoorbells, tmp_path: Path, kind: str
) -> None:
    reading, writing = os.pipe()
    (tmp_path / "file").touch()
    file = os.open(tmp_path / "file", os.O_RDONLY)
    ours, theirs = socket.socketpair()
    async with serving(path, doorbells) as connect:
        for type_ in (Type.BELL, Type.VCPU):
            sock = await connect()
            await send(sock, HELLO)
            await send(sock, Message(type_), {"pipe": reading, "file": file, "socket": ours.fileno()}[kind])
            await ended(sock)
    for fd in (reading, writing, file):
        os.close(fd)
    ours.close()
    theirs.close()


async def test_a_library_that_tells_of_no_vm_is_let_go(
    path: Path, doorbells: QemuDoorbells, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(path, doorbells) as connect:
        silent = await connect()
        told = await connect()
        await send(told, HELLO)
        assert await receive(told) == (Type.WELCOME, 0, 0)
        with trio.CancelScope():
            await ended(silent)
        assert trio.current_time() < LIMIT
        assert len(doorbells.snapshot()) == 1
        told.close()


async def test_too_many_libraries_are_turned_away(
    path: Path, doorbells: QemuDoorbells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "VMS_MAX", 2)
    async with serving(path, doorbells) as connect:
        served = [await connect() for _ in range(2)]
        for sock in served:
            await send(sock, HELLO)
            assert await receive(sock) == (Type.WELCOME, 0, 0)
        await ended(await connect())
        served[0].close()
        await trio.testing.wait_all_tasks_blocked()
        again = await connect()
        await send(again, HELLO)
        assert await receive(again) == (Type.WELCOME, 0, 0)
        for sock in (again, *served):
            sock.close()


async def test_one_that_has_told_of_no_vm_gives_its_place_to_the_next(
    path: Path, doorbells: QemuDoorbells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "VMS_MAX", 2)
    async with serving(path, doorbells) as connect:
        told, silent = await connect(), await connect()
        await send(told, HELLO)
        assert await receive(told) == (Type.WELCOME, 0, 0)
        late = await connect()
        await ended(silent)
        await send(late, HELLO)
        assert await receive(late) == (Type.WELCOME, 0, 0)
        assert len(doorbells.snapshot()) == 2
        told.close()
        late.close()


async def test_libraries_that_never_stop_talking_keep_no_other_waiting(path: Path, doorbells: QemuDoorbells) -> None:
    async def talk(sock: trio.socket.SocketType) -> None:
        while True:
            await send(sock, HELLO)

    with OwnedFd(os.eventfd(0)) as kick, capture_logs() as logs:
        async with serving(path, doorbells) as connect:
            talkers = [await connect() for _ in range(8)]
            async with trio.open_nursery() as nursery:
                for sock in talkers:
                    nursery.start_soon(talk, sock)
                honest = await connect()
                await send(honest, HELLO)
                assert await receive(honest) == (Type.WELCOME, 0, 0)
                doorbells.kick_changed("disk", 0, eventfd_id(kick.fileno()))
                await send(honest, Message(Type.BELL, bell=BELL, serial=1), kick.fileno())
                assert await receive(honest) == (Type.REGISTER, BELL, 1)
                nursery.cancel_scope.cancel()
            assert len(logs) <= len(talkers) + 1  # a line for each that came, none for what it says again
            for sock in (honest, *talkers):
                sock.close()


async def test_a_library_that_reads_nothing_holds_up_nobody_and_learns_what_is_true_when_it_reads(
    path: Path, doorbells: QemuDoorbells
) -> None:
    with OwnedFd(os.eventfd(0)) as kick:
        doorbells.set_policy("disk", "withhold")
        doorbells.kick_changed("disk", 0, eventfd_id(kick.fileno()))
        async with serving(path, doorbells) as connect:
            deaf, honest = await connect(), await connect()
            for sock in (deaf, honest):
                await send(sock, HELLO)
                await send(sock, Message(Type.BELL, bell=BELL, serial=1), kick.fileno())
                assert await receive(sock) == (Type.WELCOME, 0, 0)
            for _ in range(1000):  # far more orders than a socket holds
                doorbells.set_policy("disk", "offer")
                assert await receive(honest) == (Type.REGISTER, BELL, 1)
                doorbells.set_policy("disk", "withhold")
                assert await receive(honest) == (Type.WITHDRAW, BELL, 1)
            doorbells.set_policy("disk", "offer")
            assert await receive(honest) == (Type.REGISTER, BELL, 1)
            orders = [await receive(deaf)]
            with trio.move_on_after(LIMIT / 2) as rest:
                while orders[-1][0] != Type.REGISTER or deaf_has_more(deaf):
                    orders.append(await receive(deaf))
                    await trio.testing.wait_all_tasks_blocked()
            assert not rest.cancelled_caught
            assert len(orders) < 1000
            deaf.close()
            honest.close()


def deaf_has_more(sock: trio.socket.SocketType) -> bool:
    return bool(select.select([sock.fileno()], [], [], 0)[0])


async def test_statistics_beyond_the_bound_are_closed(
    path: Path, doorbells: QemuDoorbells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "DESCRIPTORS_SHARE", 1 << 40)
    with capture_logs() as logs, OwnedFd(os.eventfd(0)) as fd:
        async with serving(path, doorbells) as connect:
            sock = await connect()
            await send(sock, HELLO)
            assert await receive(sock) == (Type.WELCOME, 0, 0)
            before = open_descriptors()
            for number in range(3):
                await send(sock, Message(Type.VCPU, vcpu=number), fd.fileno())
            await trio.testing.wait_all_tasks_blocked()
            assert open_descriptors() == before
            assert [line["event"] for line in logs].count("too many vCPUs to read the statistics of all") == 1
            sock.close()


# Descriptors


def test_the_number_of_an_eventfd_is_that_of_its_duplicates() -> None:
    with OwnedFd(os.eventfd(0)) as one, OwnedFd(os.eventfd(0)) as other, one.duplicate() as again:
        assert doorbell_id(one) == doorbell_id(again) != doorbell_id(other)


KVM_GET_STATS_FD: Final = 0xAECE


def test_the_hypercalls_of_a_vcpu_are_read_from_kvm() -> None:
    import fcntl

    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm here that this user may open: no statistics to read")
    with OwnedFd(os.open("/dev/kvm", os.O_RDWR)) as kvm, OwnedFd(fcntl.ioctl(kvm.fileno(), 0xAE01, 0)) as vm:
        with OwnedFd(fcntl.ioctl(vm.fileno(), 0xAE41, 0)) as vcpu:
            fd = fcntl.ioctl(vcpu.fileno(), KVM_GET_STATS_FD, 0)
        statistics = VcpuStatistics(OwnedFd(fd))
        assert statistics._offset is not None
        assert statistics.hypercalls() == 0
        statistics.close()


def made_up_statistics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> OwnedFd:
    """A file that passes for KVM's."""
    monkeypatch.setattr("transports.stock_qemu.descriptors._STATISTICS", str(tmp_path))
    (tmp_path / "stats").write_bytes(content)
    return OwnedFd(os.open(tmp_path / "stats", os.O_RDONLY))


def table(*names: bytes, name_size: int = 16, count: int | None = None) -> bytes:
    """Statistics whose i-th value is 1000 + i."""
    descriptor_size = 16 + name_size
    data_offset = 24 + descriptor_size * len(names)
    header = struct.pack("<6I", 0, name_size, len(names) if count is None else count, 24, 24, data_offset)
    descriptors = [
        struct.pack("<IhHII", 0, 0, 1, 8 * place, 0) + name.ljust(name_size, b"\0") for place, name in enumerate(names)
    ]
    values = struct.pack(f"<{len(names)}Q", *range(1000, 1000 + len(names)))
    return header + b"".join(descriptors) + values


def test_the_counter_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = table(b"exits", b"hypercalls_not", b"hypercalls", b"others")
    assert VcpuStatistics(made_up_statistics(monkeypatch, tmp_path, content)).hypercalls() == 1002


def test_a_kvm_that_does_not_count_hypercalls_counts_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert VcpuStatistics(made_up_statistics(monkeypatch, tmp_path, table(b"exits"))).hypercalls() == 0


@pytest.mark.parametrize(
    "content", [table(b"exits", count=5000), table(b"exits", name_size=300)], ids=["too many", "too long"]
)
def test_a_table_beyond_reason_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    fd = made_up_statistics(monkeypatch, tmp_path, content)
    with pytest.raises(PeerError, match="statistics with"):
        VcpuStatistics(fd)
    assert fd.closed
