"""A console that ends at two file descriptors of this process: the terminal ``hyperbell microvm`` was started in.

The descriptors are shared with whoever started us (a shell has the same open file), so they stay blocking, and a
thread waits where they block. Nothing here changes the terminal's modes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from virtio.devices.console.device import Console, ConsoleOptions, EndOptions
from virtio.devices.console.port import UNREAD_PIECE, Pending, PortEnd
from virtio.devices.host.outbox import Outbox

READ_SIZE: Final = 4096
ESCAPE: Final = 0x01  # Ctrl-A
HELP: Final = b"\r\nCtrl-A x  end the virtual machine\r\nCtrl-A Ctrl-A  send Ctrl-A\r\nCtrl-A h  this help\r\n"


class Escapes:
    """Takes the keys that are for us out of what is typed: Ctrl-A and one more, as in QEMU."""

    def __init__(self) -> None:
        self._after_escape = False
        self.leave = False
        """Ctrl-A x was typed."""
        self.help = False
        """Ctrl-A h was typed; whoever shows the help sets it back."""

    def filter(self, typed: bytes) -> bytes:
        """What of ``typed`` is for the guest. An unknown key after Ctrl-A is dropped with it."""
        kept = bytearray()
        for key in typed:
            if not self._after_escape:
                if key == ESCAPE:
                    self._after_escape = True
                else:
                    kept.append(key)
                continue
            self._after_escape = False
            if key == ESCAPE:
                kept.append(key)
            elif key in b"xX":
                self.leave = True
            elif key in b"hH?":
                self.help = True
        return bytes(kept)


class FdWriter:
    """Writes to ``fd``, which stays the caller's, in a thread: who sends never waits for whoever reads it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._outbox = Outbox()
        self._idle = trio.Event()
        self._idle.set()
        self._gone = False
        # A thread that waits for a terminal must not take a place among those that others need.
        self._limit = trio.CapacityLimiter(1)

    async def run(self) -> None:
        while not self._gone:
            data = await self._outbox.get()
            try:
                await trio.to_thread.run_sync(_write_all, self._fd, data, abandon_on_cancel=True, limiter=self._limit)
            except OSError:
                self._gone = True  # nobody reads any more; the guest goes on
            if self._gone or self._outbox.empty:
                self._idle.set()

    def send(self, data: bytes) -> None:
        """The oldest is lost where too much waits."""
        if self._gone:
            return
        self._outbox.put(data)
        if self._idle.is_set():
            self._idle = trio.Event()

    async def flush(self) -> None:
        """Until all that was sent has been written, or nobody reads; the caller bounds how long that may take."""
        await self._idle.wait()


class TerminalEnd:
    """Reads ``read_fd`` until it ends and writes to ``write_fd``; both stay the caller's.

    ``escapes`` is for a person at a terminal; ``None`` passes every byte on.
    """

    connected = True
    piece: Final = UNREAD_PIECE

    def __init__(
        self, pending: Pending, read_fd: int, write_fd: int, escapes: Escapes | None, leave: Callable[[], None]
    ) -> None:
        self._pending = pending
        self._read_fd = read_fd
        self._writer = FdWriter(write_fd)
        self._escapes = escapes
        self._leave = leave

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._writer.run)
            nursery.start_soon(self._read)
            task_status.started()

    async def _read(self) -> None:
        while data := await self._read_some():
            if self._escapes is not None:
                data = self._escapes.filter(data)
                if self._escapes.help:
                    self._escapes.help = False
                    self.send(HELP)
                if self._escapes.leave:
                    self._leave()
                    return
            if data:
                await self._pending.feed(data)

    async def _read_some(self) -> bytes:
        """What there is to read; empty at the end of input, and when the terminal is gone."""
        while True:
            try:
                await trio.lowlevel.wait_readable(self._read_fd)
            except PermissionError:
                # A regular file or /dev/null: epoll does not know them, and reading them never waits.
                await trio.lowlevel.checkpoint()
            except OSError:
                return b""
            try:
                return os.read(self._read_fd, READ_SIZE)
            except BlockingIOError:
                pass  # another program at this terminal has read it
            except OSError:
                return b""

    def send(self, data: bytes) -> None:
        self._writer.send(data)

    async def flush(self) -> None:
        """As ``FdWriter.flush``."""
        await self._writer.flush()

    def close(self) -> None:
        """The descriptors are not ours."""


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class TerminalConsole(Console):
    """The console device with its first port at two descriptors; they are the process's, so no file configures it."""

    def __init__(
        self,
        name: str,
        options: ConsoleOptions,
        queue_size: int,
        *,
        read_fd: int,
        write_fd: int,
        escapes: Escapes | None,
        leave: Callable[[], None],
    ) -> None:
        self._make_terminal = partial(TerminalEnd, read_fd=read_fd, write_fd=write_fd, escapes=escapes, leave=leave)
        self.terminal: TerminalEnd
        super().__init__(name, options, 1, queue_size)

    def make_end(self, number: int, name: str, options: EndOptions, pending: Pending) -> PortEnd:
        if number:
            return super().make_end(number, name, options, pending)
        self.terminal = self._make_terminal(pending)
        return self.terminal
