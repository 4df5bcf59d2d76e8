"""The driver's side of the packed virtqueue, section 2.8. See ``driver.py``."""

from __future__ import annotations

from collections.abc import Sequence

from virtio.testing.guest_memory import GuestMemory, full_fence
from virtio.testing.virtqueue_driver import (
    DESC,
    RING_EVENT_FLAGS_DESC,
    RING_EVENT_FLAGS_DISABLE,
    VIRTQ_DESC_F_AVAIL,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_USED,
    VIRTQ_DESC_F_WRITE,
    Buffer,
    Desc,
    DeviceBrokeSpecError,
    Element,
    VirtqueueDriver,
    need_event,
)


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
        for slot in range(size):  # as the laps before left them: both bits as the wrap counter was
            done = wrap if slot < start else not wrap
            self.store_flags(slot, VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED if done else 0)

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

    def _place(self, buffer: Buffer, descs: list[Desc]) -> None:
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

    def _next_used(self) -> tuple[Buffer, int] | None:
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
        return DESC.pack(desc.gpa, desc.length, desc.link, desc.flags)

    def _unpack(self, raw: bytes) -> tuple[int, int, int, int]:
        gpa, length, link, flags = DESC.unpack(raw)
        return gpa, length, flags, link
