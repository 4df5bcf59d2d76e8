"""What the Unix sockets that devices have of their own share: listening, and a bounded backlog for each reader."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from pathlib import Path
from typing import Final

import trio

from virtio.errors import HostError

BACKLOG_MAX: Final = 256 * 1024
"""Bytes a reader may be behind; what a newly connected one still gets to see of the past, too."""

BACKLOG: Final = 4
"""Clients that wait to be let in."""


class Outbox:
    """Bytes on their way to one reader, bounded; the oldest go first when nobody reads."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._arrived = trio.Event()

    def put(self, data: bytes) -> bool:
        """Append; False when something old had to go for it."""
        self._pieces.append(data)
        self._size += len(data)
        self._arrived.set()
        kept = True
        while self._size > BACKLOG_MAX:
            self._size -= len(self._pieces.popleft())
            kept = False
        return kept

    @property
    def empty(self) -> bool:
        return not self._pieces

    async def get(self) -> bytes:
        while not self._pieces:
            self._arrived = trio.Event()
            await self._arrived.wait()
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        return data


def listen(
    path: Path, what: str, kind: socket.SocketKind = socket.SOCK_STREAM, backlog: int = BACKLOG
) -> socket.socket:
    """A socket that listens at ``path`` (mode 0600); ``what`` names its purpose in the ``HostError``."""
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        if path.is_socket() and not _somebody_listens(path, kind):
            path.unlink()  # left behind by a daemon that died
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        # Without a number it is Python that refuses, a path that is too long.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise HostError(f"{what} socket {path}: {reason}", errno=error.errno or 0) from error
    return listener


def _somebody_listens(path: Path, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) != errno.ECONNREFUSED  # a full backlog is somebody's too


def file_identity(path: Path) -> tuple[int, int] | None:
    """What tells the file at ``path`` from another that is put in its place."""
    try:
        info = path.lstat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
