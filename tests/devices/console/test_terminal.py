"""The console at two descriptors of the process: its terminal, or pipes, or whatever it was started with."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from kit.front_end.frontend import Setting, every_python_setting, plugged
from kit.front_end.vhost_user_wire import no_fd_leaks
from kit.guest.console import RECEIVE, receive_exactly, take, type_in

from virtio.devices.console.device import ConsoleOptions
from virtio.devices.console.port import Pending
from virtio.devices.console.terminal import HELP, Escapes, TerminalConsole, TerminalEnd
from virtio.devices.host.outbox import BACKLOG_MAX
from virtio.testing.queue import GUARD

EVERY_BYTE = bytes(range(256)) * 4


class Ends:
    """The other ends of a terminal's two descriptors."""

    def __init__(self, fds: tuple[int, int]) -> None:
        self.read_fd, self.write_fd = fds
        self.left = trio.Event()

    def console(self, escapes: Escapes | None = None, **size: int) -> TerminalConsole:
        return TerminalConsole(
            "console",
            ConsoleOptions(**size),
            64,
            read_fd=self.read_fd,
            write_fd=self.write_fd,
            escapes=escapes,
            leave=self.left.set,
        )


@pytest.fixture
def pipes() -> Iterator[tuple[Ends, int, int]]:
    """A terminal's ends, and what types into it and reads from it."""
    typed_from, typed = os.pipe()
    shown, shown_to = os.pipe()
    yield Ends((typed_from, shown_to)), typed, shown
    for fd in (typed_from, typed, shown, shown_to):
        try:
            os.close(fd)
        except OSError:
            continue  # a test closed it


@every_python_setting
async def test_bytes_go_both_ways_unchanged_and_the_descriptors_stay_blocking(
    setting: Setting, pipes: tuple[Ends, int, int]
) -> None:
    ends, typed, shown = pipes
    with no_fd_leaks():
        screen = trio.lowlevel.FdStream(os.dup(shown))
        keyboard = trio.lowlevel.FdStream(os.dup(typed))
        async with plugged(ends.console(), setting) as p, screen, keyboard:
            with trio.fail_after(GUARD):
                await type_in(p.guest, EVERY_BYTE)
                assert await receive_exactly(screen, len(EVERY_BYTE)) == EVERY_BYTE
                await keyboard.send_all(EVERY_BYTE)
                assert await take(p.guest.queues[RECEIVE], len(EVERY_BYTE)) == EVERY_BYTE
        for fd in (ends.read_fd, ends.write_fd):  # a shell shares them: it would trip over O_NONBLOCK
            assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.mark.parametrize(
    ("typed", "guest", "leaves"),
    [
        (b"plain\x03text", b"plain\x03text", False),
        (b"a\x01\x01b", b"a\x01b", False),
        (b"a\x01xb", b"ab", True),
        (b"\x01X", b"", True),
        (b"\x01q\x01\x01", b"\x01", False),
        (b"xyz", b"xyz", False),
    ],
)
@pytest.mark.parametrize("pieces", [1, 100])
def test_the_escape_is_taken_out_of_what_is_typed(typed: bytes, guest: bytes, leaves: bool, pieces: int) -> None:
    escapes = Escapes()
    size = len(typed) if pieces == 1 else 1
    kept = b"".join(escapes.filter(typed[at : at + size]) for at in range(0, len(typed), size))
    assert kept == guest
    assert escapes.leave == leaves


@every_python_setting
async def test_the_escape_ends_the_machine_and_shows_its_help(setting: Setting, pipes: tuple[Ends, int, int]) -> None:
    ends, typed, shown = pipes
    async with plugged(ends.console(Escapes()), setting) as p, trio.lowlevel.FdStream(os.dup(shown)) as screen:
        with trio.fail_after(GUARD):
            os.write(typed, b"ls\x01h")
            assert await take(p.guest.queues[RECEIVE], 2) == b"ls"
            assert await receive_exactly(screen, len(HELP)) == HELP
            os.write(typed, b"\x01x")
            await ends.left.wait()


@every_python_setting
async def test_input_that_ends_leaves_the_output(setting: Setting, pipes: tuple[Ends, int, int]) -> None:
    ends, typed, shown = pipes
    async with plugged(ends.console(), setting) as p, trio.lowlevel.FdStream(os.dup(shown)) as screen:
        with trio.fail_after(GUARD):
            os.write(typed, b"last")
            os.close(typed)
            assert await take(p.guest.queues[RECEIVE], 4) == b"last"
            await type_in(p.guest, b"still here")
            assert await receive_exactly(screen, 10) == b"still here"


@every_python_setting
async def test_a_file_is_typed_in_as_well_as_a_terminal(
    setting: Setting, tmp_path: Path, pipes: tuple[Ends, int, int]
) -> None:
    ends, _, _ = pipes
    script = tmp_path / "script"
    script.write_bytes(EVERY_BYTE)
    with script.open("rb") as file:
        async with plugged(Ends((file.fileno(), ends.write_fd)).console(), setting) as p:
            with trio.fail_after(GUARD):
                assert await take(p.guest.queues[RECEIVE], len(EVERY_BYTE)) == EVERY_BYTE


@every_python_setting
async def test_a_reader_that_left_does_not_hold_up_the_guest(setting: Setting, pipes: tuple[Ends, int, int]) -> None:
    ends, _, shown = pipes
    console = ends.console()
    os.close(shown)
    async with plugged(console, setting) as p:
        with trio.fail_after(GUARD):
            await type_in(p.guest, EVERY_BYTE)
            await console.terminal.flush()
            await type_in(p.guest, EVERY_BYTE)


@every_python_setting
async def test_a_reader_that_does_not_read_holds_up_nobody_and_loses_only_the_oldest(
    setting: Setting, pipes: tuple[Ends, int, int]
) -> None:
    ends, _, shown = pipes
    console = ends.console()
    async with plugged(console, setting) as p, trio.lowlevel.FdStream(os.dup(shown)) as screen:
        with trio.fail_after(GUARD):
            for _ in range(2 * BACKLOG_MAX // len(EVERY_BYTE)):
                await type_in(p.guest, EVERY_BYTE)
            await type_in(p.guest, b"the end")
            seen = b""
            while not seen.endswith(b"the end"):
                seen += await screen.receive_some(1 << 16)
            assert len(seen) >= BACKLOG_MAX - len(EVERY_BYTE)


async def test_all_that_was_printed_is_shown_before_a_flush_returns(pipes: tuple[Ends, int, int]) -> None:
    ends, _, shown = pipes
    end = TerminalEnd(Pending(), ends.read_fd, ends.write_fd, None, lambda: None)
    data = EVERY_BYTE * 128  # more than a pipe takes: the writer has to wait for us
    async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(os.dup(shown)) as screen:
        await nursery.start(end.run)
        await end.flush()
        end.send(data)
        end.send(b"last words")
        seen = bytearray()

        async def read() -> None:
            with trio.fail_after(GUARD):
                seen.extend(await receive_exactly(screen, len(data) + 10))

        nursery.start_soon(read)
        with trio.fail_after(GUARD):
            await end.flush()
            while len(seen) < len(data) + 10:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert bytes(seen) == data + b"last words"
        nursery.cancel_scope.cancel()


def test_a_new_size_of_the_terminal_is_told_to_the_driver(pipes: tuple[Ends, int, int]) -> None:
    ends, _, _ = pipes
    console = ends.console(columns=80, rows=24)
    told: list[bytes] = []
    console.config_changed = lambda: told.append(console.config_space())
    assert struct.unpack_from("<HH", console.config_space()) == (80, 24)
    console.resize(80, 24)
    assert told == []
    console.resize(132, 50)
    assert [struct.unpack_from("<HH", config) for config in told] == [(132, 50)]
