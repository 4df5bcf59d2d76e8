"""The driver's side of the split virtqueue, section 2.7. See ``driver.py``."""

from __future__ import annotations

from collections.abc import Sequence

from virtio.testing.guest_memory import GuestMemory, full_fence
from virtio.testing.virtqueue_driver import (
    DESC,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_USED_F_NO_NOTIFY,
    Buffer,
    Desc,
    DeviceBrokeSpecError,
    Element,
    VirtqueueDriver,
    need_event,
)


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

    def _place(self, buffer: Buffer, descs: list[Desc]) -> None:
        buffer.slots = [self._free.pop(0) for _ in descs]
        following = [*buffer.slots[1:], 0]
        for slot, link, desc in zip(buffer.slots, following, descs, strict=True):
            more = VIRTQ_DESC_F_NEXT if slot != buffer.slots[-1] else 0
            self.write_desc(slot, desc._replace(flags=desc.flags | more, link=link))
        self.in_flight[buffer.slots[0]] = buffer
        self.memory.store(self.avail + 4 + 2 * (self.avail_idx % self.size), 2, buffer.slots[0])
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def _next_used(self) -> tuple[Buffer, int] | None:
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
        return DESC.pack(desc.gpa, desc.length, desc.flags, desc.link)

    def _unpack(self, raw: bytes) -> tuple[int, int, int, int]:
        gpa, length, flags, link = DESC.unpack(raw)
        return gpa, length, flags, link
