"""What the driver's sides of both ring formats share: buffers, tokens, the interface. See ``driver.py``."""

from __future__ import annotations

import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from virtio.testing.guest_memory import GuestMemory

VIRTQ_DESC_F_NEXT: Final = 1
VIRTQ_DESC_F_WRITE: Final = 2
VIRTQ_DESC_F_INDIRECT: Final = 4
VIRTQ_DESC_F_AVAIL: Final = 1 << 7
VIRTQ_DESC_F_USED: Final = 1 << 15
VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1
VIRTQ_USED_F_NO_NOTIFY: Final = 1
RING_EVENT_FLAGS_ENABLE: Final = 0
RING_EVENT_FLAGS_DISABLE: Final = 1
RING_EVENT_FLAGS_DESC: Final = 2

DESC: Final = struct.Struct("<QIHH")


class RingFullError(Exception):
    """Not enough free descriptors for this buffer; take used ones back first."""


class DeviceBrokeSpecError(AssertionError):
    """The device did to the ring what no device may do."""


class Element(NamedTuple):
    """One piece of a buffer."""

    gpa: int
    length: int
    writable: bool


class Desc(NamedTuple):
    """A descriptor as it lies in memory; ``link`` is ``next`` (split) or the buffer id (packed)."""

    gpa: int
    length: int
    flags: int
    link: int


class Used(NamedTuple):
    """A buffer that came back: what ``add`` returned for it, the device's ``len``, the writable pieces' contents."""

    token: int
    written: int
    buffers: list[bytes]


@dataclass
class Buffer:
    token: int
    elements: list[Element]
    slots: list[int]
    owned: list[tuple[int, int]] = field(default_factory=list)


def need_event(event: int, new: int, old: int) -> bool:
    """2.7.10: did the index pass ``event`` on its way from ``old`` to ``new``? All modulo 2^16."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class VirtqueueDriver(ABC):
    """What both formats have in common. ``desc``, ``avail``, ``used``: guest physical addresses of the three areas."""

    def __init__(self, memory: GuestMemory, size: int, event_idx: bool, areas: tuple[int, int, int]) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.area_sizes = areas
        # 2.7: 16, 2 and 4 byte alignment; 2.8.10.1: 16, 4 and 4.
        self.desc, self.avail, self.used_area = (memory.allocate(n, 16) for n in areas)
        self.in_flight: dict[int, Buffer] = {}
        self._tokens = 0

    def add(
        self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False, publish: bool = True
    ) -> int:
        """Make a buffer available: one piece for each of ``readable``, then one of each size in ``writable``.

        The token returned comes back in ``Used``. ``publish=False`` keeps it (and what follows) from the device until
        ``publish()``. Raises ``RingFullError``.
        """
        pieces = [(len(data), data) for data in readable] + [(size, None) for size in writable]
        owned, elements = [], []
        for length, data in pieces:
            gpa = self.memory.allocate(max(length, 1))
            owned.append((gpa, max(length, 1)))
            if data is not None:
                self.memory.write(gpa, data)
            elements.append(Element(gpa, length, data is None))
        try:
            return self.add_elements(elements, indirect=indirect, publish=publish, owned=owned)
        except RingFullError:
            for piece in owned:
                self.memory.release(*piece)
            raise

    def add_elements(
        self,
        elements: Sequence[Element],
        *,
        indirect: bool = False,
        publish: bool = True,
        owned: Sequence[tuple[int, int]] = (),
    ) -> int:
        """The same for pieces that lie in guest memory already; ``owned`` is released when the buffer comes back."""
        need = 1 if indirect else len(elements)
        if need > self.free_slots:
            raise RingFullError(f"{need} descriptors wanted, {self.free_slots} of {self.size} free")
        self._tokens += 1
        buffer = Buffer(self._tokens, list(elements), [], list(owned))
        if indirect:
            table = self.memory.allocate(16 * len(elements))
            buffer.owned.append((table, 16 * len(elements)))
            self.memory.write(table, self._table(elements))
            self._place(buffer, [Desc(table, 16 * len(elements), VIRTQ_DESC_F_INDIRECT, 0)])
        else:
            flags = [VIRTQ_DESC_F_WRITE if e.writable else 0 for e in elements]
            self._place(buffer, [Desc(e.gpa, e.length, f, 0) for e, f in zip(elements, flags, strict=True)])
        if publish:
            self.publish()
        return buffer.token

    def used(self) -> list[Used]:
        """Take back everything the device has used."""
        taken: list[Used] = []
        while (entry := self._next_used()) is not None:
            buffer, written = entry
            room = sum(e.length for e in buffer.elements if e.writable)
            if written > room:
                raise DeviceBrokeSpecError(f"used length {written} of a buffer with {room} writable bytes (2.7.8.2)")
            contents = [self.memory.read(e.gpa, e.length) for e in buffer.elements if e.writable]
            taken.append(Used(buffer.token, written, contents))
            for piece in buffer.owned:
                self.memory.release(*piece)
        return taken

    def kick(self, fd: int) -> None:
        os.eventfd_write(fd, 1)

    def kick_if_needed(self, fd: int) -> bool:
        wanted = self.needs_kick()
        if wanted:
            self.kick(fd)
        return wanted

    def want_interrupts(self, on: bool) -> bool:
        """Ask for an interrupt with the next used buffer, or for none. True: used buffers are waiting already."""
        if on:
            return self.want_interrupt_after(1)
        self._refuse_interrupts()
        return self.has_used()

    def read_desc(self, index: int) -> Desc:
        return Desc(*self._unpack(self.memory.read(self.desc + 16 * index, 16)))

    def write_desc(self, index: int, desc: Desc) -> None:
        self.memory.write(self.desc + 16 * index, self._pack(desc))

    def write_table(self, descs: Sequence[Desc]) -> int:
        """An indirect table of these very descriptors; its address."""
        table = self.memory.allocate(16 * len(descs))
        self.memory.write(table, b"".join(self._pack(d) for d in descs))
        return table

    def _table(self, elements: Sequence[Element]) -> bytes:
        return b"".join(self._pack(d) for d in self._table_descs(elements))

    @property
    @abstractmethod
    def free_slots(self) -> int: ...
    @property
    @abstractmethod
    def base(self) -> int:
        """The position of a device that has taken and used all there is, in vhost-user's encoding."""

    @abstractmethod
    def publish(self) -> None: ...
    @abstractmethod
    def needs_kick(self) -> bool:
        """Does the device want to hear of what was published since this was last asked?"""

    @abstractmethod
    def has_used(self) -> bool: ...
    @abstractmethod
    def want_interrupt_after(self, entries: int) -> bool:
        """Ask for one when ``entries`` more ring entries (split: buffers, packed: descriptors) are used."""

    @abstractmethod
    def _refuse_interrupts(self) -> None: ...
    @abstractmethod
    def _place(self, buffer: Buffer, descs: list[Desc]) -> None: ...
    @abstractmethod
    def _next_used(self) -> tuple[Buffer, int] | None: ...
    @abstractmethod
    def _table_descs(self, elements: Sequence[Element]) -> list[Desc]: ...
    @abstractmethod
    def _pack(self, desc: Desc) -> bytes: ...
    @abstractmethod
    def _unpack(self, raw: bytes) -> tuple[int, int, int, int]: ...
