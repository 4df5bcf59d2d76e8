"""What a guest has sent and the host's socket has not taken yet: bytes, or whole messages of a seqpacket."""

from __future__ import annotations

import socket as sockets
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

MESSAGES_MAX: Final = 4096
"""Messages of a seqpacket connection that wait for the host at most: credit counts bytes only (5.10.6.3)."""


class Backlog:
    """Bytes in order; with ``messages`` they are written message by message, and an empty one counts too."""

    def __init__(self, *, messages: bool) -> None:
        self._messages: Final = messages
        self._bytes = bytearray()
        self._lengths: deque[int] = deque()  # of the messages

    def __len__(self) -> int:
        """In bytes."""
        return len(self._bytes)

    def __bool__(self) -> bool:
        return bool(self._lengths or self._bytes)

    @property
    def has_too_many(self) -> bool:
        return len(self._lengths) > MESSAGES_MAX

    def add(self, data: memoryview) -> None:
        if self._messages:
            self._lengths.append(len(data))
        self._bytes += data

    def clear(self) -> None:
        self._bytes = bytearray()  # another one: somebody may be about to write the old one
        self._lengths.clear()

    async def flush_when_possible(self, socket: sockets.socket, write: Callable[[memoryview], int]) -> None:
        """Wait until the socket takes something, and write what it takes: see ``flush``."""
        await trio.lowlevel.wait_writable(socket)
        self.flush(write)

    def flush(self, write: Callable[[memoryview], int]) -> None:
        """Hand out all there is, until ``write`` says -1 (not now) instead of how much it took, or clears the rest."""
        while self:
            length = self._lengths[0] if self._messages else len(self._bytes)
            with memoryview(self._bytes) as whole, whole[:length] as data:
                taken = write(data)
            if taken < 0 or not self:
                return
            del self._bytes[:taken]
            if self._messages:
                self._lengths.popleft()
