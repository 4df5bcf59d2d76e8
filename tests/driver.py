"""The driver's side of a virtqueue, in plain Python over shared memory: what a guest kernel does, split and packed.

Used wherever something must play the guest: device tests, vhost-user integration tests, our own virtio-mmio. It
imports nothing of the project, so that both sides never share a mistake. Sections 2.7 and 2.8 of the specification.

Everything that a driver may get wrong can be got wrong here on purpose: every field of a ring can be read and
written by hand (``read_desc``, ``write_desc``, ``put_avail``, ``set_avail_idx``, ``put_descs``).
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

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

_DESC: Final = struct.Struct("<QIHH")
_FENCE: Final = threading.Lock()


class RingFullError(Exception):
    """Not enough free descriptors for this buffer; take used ones back first."""


class DeviceBrokeSpecError(AssertionError):
    """The device did to the ring what no device may do."""


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
class _Buffer:
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
        self.in_flight: dict[int, _Buffer] = {}
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
        buffer = _Buffer(self._tokens, list(elements), [], list(owned))
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
    def _place(self, buffer: _Buffer, descs: list[Desc]) -> None: ...
    @abstractmethod
    def _next_used(self) -> tuple[_Buffer, int] | None: ...
    @abstractmethod
    def _table_descs(self, elements: Sequence[Element]) -> list[Desc]: ...
    @abstractmethod
    def _pack(self, desc: Desc) -> bytes: ...
    @abstractmethod
    def _unpack(self, raw: bytes) -> tuple[int, int, int, int]: ...


class SplitDriver(VirtqueueDriver):
    """A split virtqueue (2.7). ``start``: where avail and used index begin, as after a long run."""

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool = False, start: int = 0) -> None:
        super().__init__(memory, size, event_idx, (16 * size, 6 + 2 * size, 6 + 8 * size))
        self.avail_idx = self._published = self._kicked = self.last_used = start
        self._free = list(range(size))
        self.set_avail_idx(start)
        memory.store(self.used_area + 2, 2, start)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def base(self) -> int:
        return self._published

    # Fields by hand.

    def set_avail_idx(self, value: int) -> None:
        self.memory.store(self.avail + 2, 2, value)

    def put_avail(self, head: int) -> None:
        """Make the chain at ``head`` available, whatever stands there."""
        self.memory.store(self.avail + 4 + 2 * (self.avail_idx % self.size), 2, head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.publish()

    @property
    def used_idx(self) -> int:
        return self.memory.load(self.used_area + 2, 2)

    def used_entry(self, index: int) -> tuple[int, int]:
        """(id, len) of the used ring's element for this running index."""
        at = self.used_area + 4 + 8 * (index % self.size)
        return self.memory.load(at, 4), self.memory.load(at + 4, 4)

    @property
    def used_flags(self) -> int:
        return self.memory.load(self.used_area, 2)

    @property
    def avail_event(self) -> int:
        return self.memory.load(self.used_area + 4 + 8 * self.size, 2)

    @property
    def used_event(self) -> int:
        return self.memory.load(self.avail + 4 + 2 * self.size, 2)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self.memory.store(self.avail + 4 + 2 * self.size, 2, value)

    @property
    def avail_flags(self) -> int:
        return self.memory.load(self.avail, 2)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self.memory.store(self.avail, 2, value)

    # Driving.

    def publish(self) -> None:
        self._published = self.avail_idx
        self.set_avail_idx(self.avail_idx)

    def needs_kick(self) -> bool:
        old, self._kicked = self._kicked, self._published
        full_fence()
        if not self.event_idx:
            return not self.used_flags & VIRTQ_USED_F_NO_NOTIFY
        return need_event(self.avail_event, self._published, old)

    def has_used(self) -> bool:
        return self.used_idx != self.last_used

    def want_interrupt_after(self, entries: int) -> bool:
        if self.event_idx:
            self.used_event = self.last_used + entries - 1
        else:
            self.avail_flags = 0
        full_fence()
        return self.has_used()

    def _refuse_interrupts(self) -> None:
        if self.event_idx:
            self.used_event = self.last_used - 1  # passed already: 65535 buffers away
        else:
            self.avail_flags = VIRTQ_AVAIL_F_NO_INTERRUPT

    def _place(self, buffer: _Buffer, descs: list[Desc]) -> None:
        buffer.slots = [self._free.pop(0) for _ in descs]
        following = [*buffer.slots[1:], 0]
        for slot, link, desc in zip(buffer.slots, following, descs, strict=True):
            more = VIRTQ_DESC_F_NEXT if slot != buffer.slots[-1] else 0
            self.write_desc(slot, desc._replace(flags=desc.flags | more, link=link))
        self.in_flight[buffer.slots[0]] = buffer
        self.memory.store(self.avail + 4 + 2 * (self.avail_idx % self.size), 2, buffer.slots[0])
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def _next_used(self) -> tuple[_Buffer, int] | None:
        if not self.has_used():
            return None
        head, written = self.used_entry(self.last_used)
        if head not in self.in_flight:
            raise DeviceBrokeSpecError(f"used ring entry {self.last_used} names head {head}, which is not in flight")
        self.last_used = (self.last_used + 1) & 0xFFFF
        buffer = self.in_flight.pop(head)
        self._free.extend(buffer.slots)
        return buffer, written

    def _table_descs(self, elements: Sequence[Element]) -> list[Desc]:
        last = len(elements) - 1
        return [
            Desc(e.gpa, e.length, (VIRTQ_DESC_F_WRITE if e.writable else 0) | (VIRTQ_DESC_F_NEXT if i < last else 0),
                 i + 1 if i < last else 0)
            for i, e in enumerate(elements)
        ]  # fmt: skip

    def _pack(self, desc: Desc) -> bytes:
        return _DESC.pack(desc.gpa, desc.length, desc.flags, desc.link)

    def _unpack(self, raw: bytes) -> tuple[int, int, int, int]:
        gpa, length, flags, link = _DESC.unpack(raw)
        return gpa, length, flags, link


class PackedDriver(VirtqueueDriver):
    """A packed virtqueue (2.8). ``start`` and ``wrap``: position and wrap counter it begins with."""

    def __init__(
        self, memory: GuestMemory, size: int, *, event_idx: bool = False, start: int = 0, wrap: bool = True
    ) -> None:
        super().__init__(memory, size, event_idx, (16 * size, 4, 4))
        self.next_avail, self.avail_wrap = start, wrap
        self.last_used, self.used_wrap = start, wrap
        self._slots_free = size
        self._ids = list(range(size))
        self._held: tuple[int, int] | None = None  # the first unpublished descriptor and its flags
        self._added = 0

    @property
    def free_slots(self) -> int:
        return self._slots_free

    @property
    def base(self) -> int:
        position = self.next_avail | self.avail_wrap << 15
        return position | position << 16

    # Fields by hand.

    def ownership(self, wrap: bool) -> int:
        """The AVAIL and USED bits of a descriptor made available under this wrap counter (2.8.1)."""
        return VIRTQ_DESC_F_AVAIL if wrap else VIRTQ_DESC_F_USED

    def put_descs(self, descs: Sequence[Desc]) -> None:
        """Write these at the driver's position, with the right AVAIL and USED bits, the first one last."""
        placed = []
        for desc in descs:
            placed.append((self.next_avail, desc._replace(flags=desc.flags | self.ownership(self.avail_wrap))))
            self._advance_avail()
        for slot, desc in reversed(placed):
            self.write_desc(slot, desc)

    def store_flags(self, slot: int, flags: int) -> None:
        self.memory.store(self.desc + 16 * slot + 14, 2, flags)

    @property
    def device_event(self) -> tuple[int, bool, int]:
        """(offset, wrap counter, flags) as the device wrote them (2.8.14)."""
        return self._event(self.used_area)

    @property
    def driver_event(self) -> tuple[int, bool, int]:
        return self._event(self.avail)

    @driver_event.setter
    def driver_event(self, event: tuple[int, bool, int]) -> None:
        offset, wrap, flags = event
        self.memory.store(self.avail, 4, offset | wrap << 15 | flags << 16)

    def _event(self, gpa: int) -> tuple[int, bool, int]:
        word = self.memory.load(gpa, 4)
        return word & 0x7FFF, bool(word >> 15 & 1), word >> 16 & 3

    # Driving.

    def _advance_avail(self) -> None:
        self.next_avail += 1
        if self.next_avail == self.size:
            self.next_avail, self.avail_wrap = 0, not self.avail_wrap

    def publish(self) -> None:
        if self._held is not None:
            full_fence()
            self.store_flags(*self._held)
            self._held = None

    def needs_kick(self) -> bool:
        added, self._added = self._added, 0
        full_fence()
        offset, wrap, flags = self.device_event
        if flags != RING_EVENT_FLAGS_DESC:
            return flags != RING_EVENT_FLAGS_DISABLE
        if wrap != self.avail_wrap:
            offset -= self.size
        return need_event(offset, self.next_avail, self.next_avail - added)

    def has_used(self) -> bool:
        if not self.in_flight:
            return False
        flags = self.memory.load(self.desc + 16 * self.last_used + 14, 2)
        return bool(flags & VIRTQ_DESC_F_AVAIL) == bool(flags & VIRTQ_DESC_F_USED) == self.used_wrap

    def want_interrupt_after(self, entries: int) -> bool:
        offset, wrap = self.last_used + entries - 1, self.used_wrap
        if offset >= self.size:
            offset, wrap = offset - self.size, not wrap
        self.driver_event = (offset, wrap, RING_EVENT_FLAGS_DESC) if self.event_idx else (0, False, 0)
        full_fence()
        return self.has_used()

    def _refuse_interrupts(self) -> None:
        self.driver_event = (0, False, RING_EVENT_FLAGS_DISABLE)

    def _place(self, buffer: _Buffer, descs: list[Desc]) -> None:
        buffer_id = self._ids.pop(0)
        last = len(descs) - 1
        for at, desc in enumerate(descs):
            flags = desc.flags | self.ownership(self.avail_wrap) | (VIRTQ_DESC_F_NEXT if at < last else 0)
            slot = self.next_avail
            if self._held is None:  # all but the flags: the device must not look further yet (2.8.21.1)
                self._held = (slot, flags)
                old = self.memory.load(self.desc + 16 * slot + 14, 2)
                self.write_desc(slot, desc._replace(flags=old, link=buffer_id))
            else:
                self.write_desc(slot, desc._replace(flags=flags, link=buffer_id))
            buffer.slots.append(slot)
            self._advance_avail()
        self._slots_free -= len(descs)
        self._added += len(descs)
        self.in_flight[buffer_id] = buffer

    def _next_used(self) -> tuple[_Buffer, int] | None:
        if not self.has_used():
            return None
        desc = self.read_desc(self.last_used)
        if desc.link not in self.in_flight:
            raise DeviceBrokeSpecError(f"slot {self.last_used} was used with id {desc.link}, which is not in flight")
        buffer = self.in_flight.pop(desc.link)
        self.last_used += len(buffer.slots)
        if self.last_used >= self.size:
            self.last_used, self.used_wrap = self.last_used - self.size, not self.used_wrap
        self._slots_free += len(buffer.slots)
        self._ids.append(desc.link)
        # 2.8.4: without the WRITE flag the length is reserved.
        return buffer, desc.length if desc.flags & VIRTQ_DESC_F_WRITE else 0

    def _table_descs(self, elements: Sequence[Element]) -> list[Desc]:
        return [Desc(e.gpa, e.length, VIRTQ_DESC_F_WRITE if e.writable else 0, 0) for e in elements]

    def _pack(self, desc: Desc) -> bytes:
        return _DESC.pack(desc.gpa, desc.length, desc.link, desc.flags)

    def _unpack(self, raw: bytes) -> tuple[int, int, int, int]:
        gpa, length, link, flags = _DESC.unpack(raw)
        return gpa, length, flags, link
