"""The console (5.3): bytes go both ways, in order and without a loss, and neither side can hold up the other."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from kit.front_end.frontend import Setting, every_python_setting, plugged
from kit.front_end.vhost_user_wire import no_fd_leaks
from kit.guest.blk import pattern
from kit.guest.console import KIB, RECEIVE, TRANSMIT, receive_exactly, take, type_in
from kit.host.peak import Peak
from structlog.testing import capture_logs

from virtio.devices.console.device import EMERG_WR_OFFSET, Console, ConsoleOptions
from virtio.devices.console.port import LINE_MAX, PENDING_MAX
from virtio.devices.host.outbox import BACKLOG_MAX
from virtio.errors import HostError
from virtio.testing.driver import Element
from virtio.testing.queue import GUARD, GuestQueue


def console(backend: str, path: Path | None = None, **options: int) -> Console:
    return Console("console", ConsoleOptions(backend=backend, path=path, **options), 1, 64)


@asynccontextmanager
async def reader(path: Path) -> AsyncIterator[trio.SocketStream]:
    """Somebody at the host's end of a console."""
    with trio.fail_after(GUARD):
        stream = await trio.open_unix_socket(path)
        async with stream:
            yield stream


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while more := await stream.receive_some():
        data += more
    return data


def is_there(path: Path) -> bool:
    return os.path.lexists(path)


# --- a Unix socket ---


@every_python_setting
async def test_bytes_go_both_ways_through_a_socket(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "tty"
    async with plugged(console("socket", path), setting) as p, reader(path) as stream:
        await type_in(p.guest, pattern(100 * KIB, 1), at_once=3000)
        assert await receive_exactly(stream, 100 * KIB) == pattern(100 * KIB, 1)
        await stream.send_all(b"root\n")
        used = await p.guest.queues[RECEIVE].request([], [2, 1, 100])
        assert (used.written, b"".join(used.buffers)[:5]) == (5, b"root\n")
        await stream.send_all(pattern(20 * KIB, 2))
        assert await take(p.guest.queues[RECEIVE], 20 * KIB, room=777) == pattern(20 * KIB, 2)
        assert p.op("transmit", TRANSMIT) == (35, 0)
        assert p.op("receive", RECEIVE)[1] == 0
    assert not is_there(path)


@every_python_setting
async def test_only_the_owner_may_open_the_socket(setting: Setting, tmp_path: Path) -> None:
    async with plugged(console("socket", tmp_path / "tty"), setting):
        assert (tmp_path / "tty").stat().st_mode & 0o777 == 0o600


@every_python_setting
async def test_what_was_printed_before_anybody_looked_is_there_for_the_first_who_does(
    setting: Setting, tmp_path: Path
) -> None:
    path = tmp_path / "tty"
    async with plugged(console("socket", path), setting) as p:
        await type_in(p.guest, pattern(50 * KIB, 3))
        async with reader(path) as stream:
            assert await receive_exactly(stream, 50 * KIB) == pattern(50 * KIB, 3)


@every_python_setting
async def test_without_a_reader_the_guest_never_waits_and_the_latest_output_is_kept(
    setting: Setting, tmp_path: Path
) -> None:
    path = tmp_path / "tty"
    data = pattern(3 * BACKLOG_MAX, 4)
    async with plugged(console("socket", path), setting) as p:
        await type_in(p.guest, data)
        async with reader(path) as stream:
            assert await receive_exactly(stream, BACKLOG_MAX) == data[-BACKLOG_MAX:]


@every_python_setting
async def test_a_reader_that_is_too_slow_loses_its_connection_and_the_guest_no_time(
    setting: Setting, tmp_path: Path
) -> None:
    path = tmp_path / "tty"
    data = pattern(4 * BACKLOG_MAX, 5)
    async with plugged(console("socket", path), setting) as p:
        async with reader(path) as slow:
            await type_in(p.guest, b"hello")
            assert await receive_exactly(slow, 5) == b"hello"
            await type_in(p.guest, data)  # nobody reads meanwhile
            seen = await receive_all(slow)
            assert len(seen) < len(data)
            assert data.startswith(seen)
        async with reader(path) as quick:
            rest = await receive_exactly(quick, 64 * KIB)
            assert rest in data
            await quick.send_all(b"x")
            assert await take(p.guest.queues[RECEIVE], 1) == b"x"


@every_python_setting
async def test_readers_come_and_go_and_a_new_one_takes_over(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "tty"
    async with plugged(console("socket", path), setting) as p:
        with no_fd_leaks():
            async with reader(path) as first:
                await type_in(p.guest, b"one")
                assert await receive_exactly(first, 3) == b"one"
                async with reader(path) as second:
                    assert await receive_all(first) == b""
                    await type_in(p.guest, b"two")
                    assert await receive_exactly(second, 3) == b"two"
            for n in range(3):
                async with reader(path) as later:
                    text = f"number {n}".encode()
                    await later.send_all(text)
                    assert await take(p.guest.queues[RECEIVE], len(text)) == text
                    await type_in(p.guest, text)
                    assert await receive_exactly(later, len(text)) == text
            await trio.testing.wait_all_tasks_blocked()


@every_python_setting
async def test_a_reader_who_comes_when_descriptors_have_run_out_is_let_in_later(
    setting: Setting, tmp_path: Path
) -> None:
    path = tmp_path / "tty"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with capture_logs() as logs:
        async with plugged(console("socket", path), setting) as p:
            with socket.socket(socket.AF_UNIX) as plain:
                free = os.dup(plain.fileno())
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
                try:
                    plain.connect(str(path))
                    with trio.fail_after(GUARD):
                        while not any(entry["log_level"] == "error" for entry in logs):
                            await trio.testing.wait_all_tasks_blocked()
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                await type_in(p.guest, b"let in")
                plain.setblocking(False)
                with trio.fail_after(GUARD):
                    await trio.lowlevel.wait_readable(plain)
                assert plain.recv(100) == b"let in"
    (told,) = (entry for entry in logs if entry["log_level"] == "error")
    assert (told["event"], told["socket"]) == ("out of descriptors: a console's reader waits", str(path))


@every_python_setting
async def test_a_guest_that_reads_nothing_holds_up_whoever_types(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "tty"
    data = pattern(8 << 20, 6)
    async with plugged(console("socket", path), setting) as p, reader(path) as stream:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            await trio.testing.wait_all_tasks_blocked(0.01)
            pending = p.device._ports[0].pending._bytes  # type: ignore[attr-defined]
            assert PENDING_MAX <= len(pending) <= 3 * PENDING_MAX
            assert await take(p.guest.queues[RECEIVE], len(data), room=64 * KIB) == data


@every_python_setting
async def test_a_queue_that_stops_and_starts_again_loses_no_byte(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "tty"
    async with plugged(console("socket", path), setting) as p, reader(path) as stream:
        receive, transmit = p.guest.queues
        waiting = [receive.driver.add([], [16]) for _ in range(6)]
        receive.kick()
        for n in range(6):
            for index, ring in enumerate((receive, transmit)):
                base = await p.guest.link.stop(index)
                assert base == ring_base(ring, 6 - n if index == RECEIVE else 0)
            await stream.send_all(f"typed {n}".encode())
            transmit.driver.add([f"printed {n}".encode()], [])  # while nobody looks
            for index in (RECEIVE, TRANSMIT):
                await p.guest.start_queue(
                    index, base=ring_base(p.guest.queues[index], 6 - n if index == RECEIVE else 1)
                )
            (typed,) = await receive.used()
            assert (typed.token, typed.buffers[0][: typed.written]) == (waiting[n], f"typed {n}".encode())
            assert len(await transmit.used()) == 1
            assert await receive_exactly(stream, 9) == f"printed {n}".encode()


def ring_base(ring: GuestQueue, waiting: int) -> int:
    """The base of a device that has left the ``waiting`` latest buffers (of one descriptor each) in the ring."""
    base = ring.driver.base
    if type(ring.driver).__name__ == "SplitDriver":
        return (base - waiting) & 0xFFFF
    assert (base & 0x7FFF) >= waiting, "the ring is larger than this test goes"
    return base - waiting - (waiting << 16)


def test_an_address_that_is_taken_is_refused_and_one_that_is_left_over_is_not(tmp_path: Path) -> None:
    path = tmp_path / "tty"
    with no_fd_leaks():
        first = console("socket", path)
        with pytest.raises(HostError, match=f"{path}: another process listens there"):
            console("socket", path)
        identity = path.lstat().st_ino
        first.close()
        assert not is_there(path)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        second = console("socket", path)
        assert path.is_socket()
        path.unlink()
        path.touch()
        second.close()
        assert path.is_file(), "it is not ours, so it stays"
        assert identity


# --- a pty ---


@pytest.fixture
def pty_path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "pts"
    assert not is_there(tmp_path / "pts")


@every_python_setting
async def test_bytes_go_both_ways_through_a_pty_unchanged(setting: Setting, pty_path: Path) -> None:
    with no_fd_leaks():
        async with plugged(console("pty", pty_path, columns=132, rows=43), setting) as p:
            terminal = os.open(pty_path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
            assert struct.unpack("HHHH", size)[:2] == (43, 132)
            async with trio.lowlevel.FdStream(terminal) as stream:
                every_byte = bytes(range(256)) * 4
                with trio.fail_after(GUARD):
                    await type_in(p.guest, every_byte)
                    assert await receive_exactly(stream, 1024) == every_byte
                    await stream.send_all(every_byte)
                    assert await take(p.guest.queues[RECEIVE], 1024) == every_byte


@every_python_setting
async def test_a_pty_can_be_closed_and_opened_again(setting: Setting, pty_path: Path) -> None:
    async with plugged(console("pty", pty_path), setting) as p:
        for text in (b"first", b"second", b"third"):
            await type_in(p.guest, text)
            terminal = os.open(pty_path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            async with trio.lowlevel.FdStream(terminal) as stream:
                with trio.fail_after(GUARD):
                    assert await receive_exactly(stream, len(text)) == text
                    await stream.send_all(text)
                    assert await take(p.guest.queues[RECEIVE], len(text)) == text


@every_python_setting
async def test_a_pty_that_nobody_reads_never_holds_up_the_guest(setting: Setting, pty_path: Path) -> None:
    async with plugged(console("pty", pty_path), setting) as p:
        await type_in(p.guest, bytes(3 * BACKLOG_MAX))


def test_a_pty_in_use_keeps_its_link_when_another_device_wants_the_path(pty_path: Path) -> None:
    first = console("pty", pty_path)
    target = pty_path.readlink()
    with no_fd_leaks(), pytest.raises(HostError, match="another device or daemon is using it"):
        console("pty", pty_path)
    assert pty_path.readlink() == target
    first.close()
    assert not pty_path.is_symlink()


def test_a_link_that_a_killed_daemon_left_is_replaced(pty_path: Path) -> None:
    ours, theirs = os.openpty()
    try:
        for left in ("/dev/pts/99999", os.ttyname(theirs)):  # gone; or its number is another terminal's by now
            pty_path.symlink_to(left)
            device = console("pty", pty_path)
            assert str(pty_path.readlink()) != left
            device.close()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_link_that_leads_elsewhere_is_left_alone(pty_path: Path, tmp_path: Path) -> None:
    pty_path.symlink_to(tmp_path / "precious")
    with no_fd_leaks(), pytest.raises(HostError, match=f"it is a link to {tmp_path}/precious; remove it or choose"):
        console("pty", pty_path)
    assert pty_path.is_symlink()
    pty_path.unlink()


def test_a_pty_does_not_overwrite_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pts"
    path.write_text("precious")
    with no_fd_leaks(), pytest.raises(HostError, match=f"console pty {path}: File exists"):
        console("pty", path)
    assert path.read_text() == "precious"


# --- the log ---


def lines_of(logs: list[dict[str, object]]) -> list[object]:
    return [entry["line"] for entry in logs if entry["event"] == "guest console"]


@every_python_setting
async def test_every_line_the_guest_prints_is_one_line_of_the_log(setting: Setting) -> None:
    with capture_logs() as logs:
        async with plugged(console("log"), setting) as p:
            await type_in(p.guest, b"Booting\r\nLinux ver", at_once=5)
            await type_in(p.guest, b"sion 6.1\n\n\r\nlogin: ")
    assert lines_of(logs) == ["Booting", "Linux version 6.1"]  # type: ignore[arg-type]
    entry = next(entry for entry in logs if entry["event"] == "guest console")
    assert (entry["device"], entry["port"], entry["log_level"]) == ("console", "console", "info")


@every_python_setting
async def test_a_line_of_the_log_has_a_length_and_no_control_characters(setting: Setting) -> None:
    with capture_logs() as logs:
        async with plugged(console("log"), setting) as p:
            await type_in(p.guest, b"x" * (10 * LINE_MAX + 7) + b"\n", at_once=4 * LINE_MAX)
            await type_in(p.guest, b"\x1b[2J\x1b]0;owned\x07\x00\xff\xc2\x9b1m tab\there\n")
    lines = [str(line) for line in lines_of(logs)]  # type: ignore[arg-type]
    assert [len(line) for line in lines[:-1]] == [LINE_MAX] * 10 + [7]
    assert lines[-1] == r"\x1b[2J\x1b]0;owned\x07\x00\xff\x9b1m tab\there"


# --- what a console is beside its bytes ---


@every_python_setting
async def test_the_emergency_byte_is_printed_without_any_queue(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "tty"
    async with plugged(console("socket", path), setting, start=False) as p, reader(path) as stream:
        await p.guest.negotiate()
        for byte in b"panic":
            await p.guest.link.write_config(EMERG_WR_OFFSET, struct.pack("<I", byte))
        await p.guest.link.write_config(EMERG_WR_OFFSET, b"!")
        await p.guest.link.write_config(0, bytes(EMERG_WR_OFFSET) + b"?\0\0\0")
        await p.guest.link.write_config(EMERG_WR_OFFSET + 1, b"xyz")  # not the lower byte
        await p.guest.link.write_config(0, b"xyz")
        assert await receive_exactly(stream, 7) == b"panic!?"


@every_python_setting
@pytest.mark.parametrize("size", [(0, 0), (80, 25), (0xFFFF, 1)], ids=str)
async def test_the_size_is_offered_where_one_is_configured(setting: Setting, size: tuple[int, int]) -> None:
    device = console("log", columns=size[0], rows=size[1])
    async with plugged(device, setting) as p:
        assert p.guest.features & 1 == (size != (0, 0))
        assert struct.unpack("<HHII", await p.guest.link.read_config(0, 12)) == (*size, 1, 0)


@every_python_setting
async def test_a_buffer_that_claims_far_more_than_the_guest_has_costs_no_memory(
    setting: Setting, tmp_path: Path
) -> None:
    """The same MiB again and again: a chain of 200 MiB in a guest of 4."""
    async with plugged(console("socket", tmp_path / "tty"), setting, queue_size=256) as p:
        ring = p.guest.queues[TRANSMIT]
        piece = Element(p.guest.memory.allocate(1 << 20), 1 << 20, False)
        ring.driver.add_elements([piece] * 200)
        peak = Peak()
        ring.kick()
        await ring.used()
        assert peak.kib < 64 * KIB
        await type_in(p.guest, b"and on")
