"""Guest memory as a driver sees it: shared pages, words that are stored whole, barriers.

Imports nothing of the project; ``driver.py`` puts virtqueues into it.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Final

_FENCE: Final = threading.Lock()


def full_fence() -> None:
    """A full memory barrier: taking a lock is one on every machine (2.7.13.4.1 and 2.8.21.2.1 ask for it)."""
    with _FENCE:
        pass


class GuestMemory:
    """``size`` bytes of guest memory in a memfd: at ``gpa`` for the guest, at ``uva`` in the front-end's eyes.

    Words are stored through cast views, so that each is one store (``struct.pack_into`` clears the place first).
    """

    def __init__(self, size: int, gpa: int = 0x4000_0000, uva: int = 0x7F00_0000_0000, name: str = "guest") -> None:
        self.size, self.gpa, self.uva = size, gpa, uva
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._bytes = memoryview(self._map)
        self._words = {1: self._bytes, 2: self._bytes.cast("H"), 4: self._bytes.cast("I"), 8: self._bytes.cast("Q")}
        self._free: list[tuple[int, int]] = [(gpa, size)]

    def close(self) -> None:
        for view in self._words.values():
            view.release()
        self._map.close()
        os.close(self.fd)

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def to_uva(self, gpa: int) -> int:
        return gpa - self.gpa + self.uva

    def allocate(self, size: int, align: int = 16) -> int:
        """``size`` zeroed bytes; their guest physical address."""
        for at, (start, room) in enumerate(self._free):
            skip = -start % align
            if skip + size > room:
                continue
            left = [(start, skip), (start + skip + size, room - skip - size)]
            self._free[at : at + 1] = [piece for piece in left if piece[1]]
            self.write(start + skip, bytes(size))
            return start + skip
        raise MemoryError(f"guest memory of {self.size} bytes has no {size} left")

    def release(self, gpa: int, size: int) -> None:
        """Give back what ``allocate`` returned."""
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (gpa, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self._free = merged

    def read(self, gpa: int, length: int) -> bytes:
        return bytes(self._bytes[gpa - self.gpa : gpa - self.gpa + length])

    def write(self, gpa: int, data: bytes) -> None:
        self._bytes[gpa - self.gpa : gpa - self.gpa + len(data)] = data

    def load(self, gpa: int, width: int) -> int:
        """One aligned little-endian word of 1, 2, 4 or 8 bytes."""
        return self._words[width][(gpa - self.gpa) // width]

    def store(self, gpa: int, width: int, value: int) -> None:
        self._words[width][(gpa - self.gpa) // width] = value & ((1 << 8 * width) - 1)
