"""A bounded backlog for each reader of a device's socket or terminal."""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

BACKLOG_MAX: Final = 256 * 1024
"""Bytes a reader may be behind; what a newly connected one still gets to see of the past, too."""


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
