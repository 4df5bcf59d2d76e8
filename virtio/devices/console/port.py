"""The host's end of a console port: a Unix socket, a pty, or the log.

What comes from the guest never waits for the host: a reader that is too slow loses its connection, because a Linux
guest spins in its console driver until the device takes the bytes. What goes to the guest is bounded by reading no
further than ``PENDING_MAX`` ahead.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import time
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import structlog
import trio

from virtio.clients import Door
from virtio.devices.console.pty_link import claim, remove_stale_link
from virtio.devices.host.outbox import Outbox
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.remedies import with_remedy
from virtio.socket_file import Listen, SocketFile

PENDING_MAX: Final = 64 * 1024
"""Bytes read from the host ahead of a guest that does not take them."""

LINE_MAX: Final = 1024
"""Longest line of the log."""

LINES_AT_ONCE: Final = 1000
LINES_A_SECOND: Final = 50
"""Lines of the log that one device's ports may fill: what a boot prints at once, and then so many a second."""

FLOOD_SECONDS: Final = 1.0
"""How long lines are left out before a line reports how many."""

PIECE: Final = 512
UNREAD_PIECE: Final = 64 * 1024
"""Bytes of a guest's output handled at once: as many lines as take a millisecond to log, or what is only counted."""


_LINE: Final = re.compile(rb"[^\r\n]+[\r\n]*|[\r\n]+")


class PortEnd(Protocol):
    """One host end: ``run`` lives as long as the device, ``send`` takes what the guest wrote and never waits."""

    connected: bool

    @property
    def piece(self) -> int:
        """How many bytes are sent at once: between two pieces other tasks have their turn."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...
    def send(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class Pending:
    """Bytes on their way to the guest."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._arrived = trio.Event()
        self._drained = trio.Event()

    async def feed(self, data: bytes) -> None:
        """Append, then wait until there is room for more."""
        self._bytes += data
        self._arrived.set()
        while len(self._bytes) >= PENDING_MAX:
            self._drained = trio.Event()
            await self._drained.wait()

    async def wait(self) -> None:
        """Until there is something to take."""
        while not self._bytes:
            self._arrived = trio.Event()
            await self._arrived.wait()

    def take(self, limit: int) -> bytes:
        data = bytes(self._bytes[:limit])
        del self._bytes[:limit]
        self._drained.set()
        return data

    def clear(self) -> None:
        self._bytes.clear()
        self._drained.set()


class LineShare:
    """How many lines of the log the ports of one device may still fill: a boot's worth, and some each second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines = float(LINES_AT_ONCE)
        self._at = clock()

    def _refill(self) -> None:
        now = self._clock()
        self._lines = min(self._lines + (now - self._at) * LINES_A_SECOND, LINES_AT_ONCE)
        self._at = now

    @property
    def exhausted(self) -> bool:
        if self._lines < 1:
            self._refill()
        return self._lines < 1

    def take(self) -> bool:
        """One line, if there is one."""
        if self.exhausted:
            return False
        self._lines -= 1
        return True


class LogEnd:
    """Every line the guest writes becomes a line of the daemon's log, as far as the device's share goes."""

    connected = True

    def __init__(self, device: str, port: str, share: LineShare) -> None:
        self._log = structlog.get_logger().bind(device=device, port=port)
        self._line = bytearray()
        self._share = share
        self._left_out = 0
        self._flood = trio.Event()

    @property
    def piece(self) -> int:
        return UNREAD_PIECE if self._share.exhausted else PIECE

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            await self._flood.wait()
            await trio.sleep(FLOOD_SECONDS)
            self._report_flood()

    def _report_flood(self) -> None:
        if self._left_out:
            self._log.warning("guest console", line="too many lines: not all are logged", left_out=self._left_out)
        self._left_out = 0
        self._flood = trio.Event()

    def _leave_out(self, lines: int) -> None:
        self._left_out += lines
        if lines:
            self._flood.set()

    def _skip(self, data: bytes) -> None:
        """Counted, not looked at: a guest may print more than there is time to read."""
        self._leave_out(max(data.count(b"\n"), data.count(b"\r"), len(data) // LINE_MAX))
        self._line[:] = data[max(data.rfind(b"\n"), data.rfind(b"\r")) + 1 :][-LINE_MAX + 1 :]

    def send(self, data: bytes) -> None:
        for match in _LINE.finditer(data):
            if self._share.exhausted:
                self._skip(data[match.start() :])
                return
            self._line += match.group()
            while len(self._line) >= LINE_MAX:
                self._tell(self._line[:LINE_MAX])
                del self._line[:LINE_MAX]
            if self._line.endswith((b"\n", b"\r")):
                self._tell(self._line)
                self._line.clear()

    def _tell(self, line: bytearray) -> None:
        text = line.decode("utf-8", "backslashreplace").rstrip()
        if text and not self._share.take():
            self._leave_out(1)
        elif text:
            # What would steer the terminal of whoever reads the log is shown instead of obeyed.
            shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
            self._log.info("guest console", line=shown)

    def close(self) -> None:
        self._report_flood()
        self._line.clear()


class SocketEnd:
    """A Unix socket that listens at ``path`` (mode 0600); one reader at a time, a new one takes over."""

    piece: Final = UNREAD_PIECE

    def __init__(self, path: Path, pending: Pending, changed: Callable[[], None]) -> None:
        self._path = path
        self._pending = pending
        self._changed = changed
        self._outbox = Outbox()
        self._reader: trio.CancelScope | None = None
        self.connected = False
        self._file = SocketFile(Listen(path))

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        listener = trio.socket.from_stdlib_socket(self._file.socket)
        log = structlog.get_logger().bind(socket=str(self._path))
        door = Door(listener, "a console's reader", log)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                client = await door.accept()
                if self._reader is not None:
                    self._reader.cancel()
                self._reader = trio.CancelScope()
                nursery.start_soon(self._talk, trio.SocketStream(client), self._reader)

    async def _talk(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        self._set_connected(True)
        async with stream:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, stream, scope)
                    try:
                        async for data in stream:
                            await self._pending.feed(bytes(data))
                    except trio.BrokenResourceError:
                        pass  # the reader went away in the middle; so do we
                    nursery.cancel_scope.cancel()
        if self._reader is scope:
            self._reader = None
            self._set_connected(False)

    async def _write(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            while True:
                await stream.send_all(await self._outbox.get())
        except trio.BrokenResourceError:
            scope.cancel()

    def _set_connected(self, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            self._changed()

    def send(self, data: bytes) -> None:
        if not self._outbox.put(data) and self._reader is not None:
            self._reader.cancel()

    def close(self) -> None:
        self._file.close()


class PtyEnd:
    """A pseudo terminal; ``path`` is a symbolic link to it (``screen PATH``)."""

    piece: Final = UNREAD_PIECE
    connected = True

    def __init__(self, path: Path, pending: Pending, columns: int, rows: int) -> None:
        self._path = path
        self._pending = pending
        self._outbox = Outbox()
        remove_stale_link(path)
        ours, theirs = os.openpty()
        # The other side stays open here, so that the pty does not hang up between two readers.
        self._ours, self._theirs = OwnedFd(ours), OwnedFd(theirs)
        tty.setraw(theirs)
        if columns and rows:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._target = os.ttyname(theirs)
        try:
            claim(theirs, path)
            path.symlink_to(self._target)
        except OSError as error:
            self._ours.close()
            self._theirs.close()
            number = error.errno or 0
            text = f"console pty {path}: {error.strerror or error}"
            raise HostError(with_remedy(text, path, number, writing=True), errno=number) from error

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        # trio's FdStream makes the fd non-blocking; it is ours alone, so nobody is surprised.
        async with trio.lowlevel.FdStream(self._ours.duplicate().detach()) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(self._write, stream)
            task_status.started()
            async for data in stream:
                await self._pending.feed(bytes(data))

    async def _write(self, stream: trio.lowlevel.FdStream) -> None:
        while True:
            await stream.send_all(await self._outbox.get())

    def send(self, data: bytes) -> None:
        self._outbox.put(data)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
        if self._path.is_symlink() and str(self._path.readlink()) == self._target:
            self._path.unlink()
