"""The device's side of a virtqueue, for ring tests: the compiled data plane, stepped by hand beside ``driver.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytest

from virtio.dataplane import FAULTS, ffi, lib
from virtio.errors import GuestError
from virtio.fd import OwnedFd
from virtio.native.memory import Iotlb, MemoryTable
from virtio.native.virtqueue import Virtqueue
from virtio.testing.driver import Desc, GuestMemory, PackedDriver, SplitDriver, VirtqueueDriver
from virtio.waist import AddressSpace, MemoryRegion, QueueSetup

F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_ACCESS_PLATFORM: Final = 1 << 33
F_RING_PACKED: Final = 1 << 34
FORMATS: Final = ("split", "packed")


def make_driver(
    ring: str, memory: GuestMemory, size: int, *, event_idx: bool = False, start: int = 0, wrap: bool = True
) -> VirtqueueDriver:
    """A driver of this format. ``start`` and ``wrap``: where its ring stands (split rings know no wrap counter)."""
    if ring == "split":
        return SplitDriver(memory, size, event_idx=event_idx, start=start)
    return PackedDriver(memory, size, event_idx=event_idx, start=start, wrap=wrap)


def region_of(memory: GuestMemory, *, offset: int = 0, size: int | None = None, gpa: int | None = None) -> MemoryRegion:
    """``size`` bytes of the memory from ``offset`` on, at ``gpa`` (where the driver has them, by default)."""
    length = memory.size - offset if size is None else size
    at = memory.gpa + offset if gpa is None else gpa
    return MemoryRegion(at, length, memory.uva + offset, offset, OwnedFd(os.dup(memory.fd)))


@dataclass(frozen=True)
class Popped:
    """A chain in the device's hands."""

    head: int
    room: int
    readable: int
    pointer: Any

    @property
    def data(self) -> bytes:
        """The device-readable bytes, read now."""
        return self.read(0, self.readable)

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        done = lib.chain_read(self.pointer, offset, ffi.from_buffer(buffer), length)
        return bytes(buffer[:done])

    def write(self, offset: int, data: bytes) -> int:
        done: int = lib.chain_write(self.pointer, offset, ffi.from_buffer(data), len(data))
        return done


class RingDevice:
    """A device that holds chains until it is told what to do with them.

    ``features``: INDIRECT_DESC and VERSION_1 by default; EVENT_IDX and RING_PACKED follow the driver. Close it, so
    that a descriptor that leaks is seen.
    """

    def __init__(
        self,
        driver: VirtqueueDriver,
        *,
        features: int = F_INDIRECT_DESC | F_VERSION_1,
        base: int | None = None,
        space: AddressSpace = AddressSpace.GPA,
        regions: Sequence[MemoryRegion] | None = None,
        areas: tuple[int, int, int] | None = None,
        size: int | None = None,
    ) -> None:
        packed = isinstance(driver, PackedDriver)
        self.driver = driver
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.vq = Virtqueue(0, self.event_fd)
        self.iotlb = Iotlb()
        self.table = MemoryTable([region_of(driver.memory)] if regions is None else regions)
        self.features = features | (F_EVENT_IDX if driver.event_idx else 0) | (F_RING_PACKED if packed else 0)
        self.space = space
        self.size = driver.size if size is None else size
        self.areas = (driver.desc, driver.avail, driver.used_area) if areas is None else areas
        self.vq.set_call(OwnedFd(os.dup(self.call_fd)))
        self.interrupts()
        self.start(driver.base if base is None else base)

    def start(self, base: int) -> None:
        setup = QueueSetup(self.size, *self.areas, base, self.space)
        self.vq.configure(setup, self.features, self.table, self.iotlb)

    def close(self) -> None:
        pointer = self.vq.pointer
        ffi.gc(pointer, None)
        lib.virtqueue_free(pointer)
        for region in self.table.mappings:
            region.fd.close()
        os.close(self.event_fd)
        os.close(self.call_fd)

    def pop(self, limit: int = 64) -> list[Popped]:
        """Up to ``limit`` chains; none when the ring is empty, broken or waits for the IOTLB."""
        room = ffi.new("struct chain *[]", limit)
        info = ffi.new("struct chain_info *")
        popped = []
        for i in range(self.vq.pop_many(room, limit)):
            lib.chain_info(room[i], info)
            popped.append(Popped(info.head, info.writable_len, info.readable_len, room[i]))
        return popped

    def push(self, *done: tuple[Popped, bytes | int]) -> None:
        """Return chains with this data written to them (or, given a number, claimed to be)."""
        for popped, data in done:
            if isinstance(data, bytes):
                popped.write(0, data)
        lengths = [len(data) if isinstance(data, bytes) else data for _, data in done]
        self.vq.push_many([popped.pointer for popped, _ in done], lengths)

    def drop(self, *popped: Popped) -> None:
        for chain in popped:
            lib.chain_drop(chain.pointer)

    def interrupts(self) -> int:
        """How often the driver was interrupted since the last look."""
        return read_counter(self.call_fd)

    @property
    def fault(self) -> int:
        """``VQ_FAULT_*``; 0 while the queue is whole."""
        error = self.vq.report().error
        return 0 if error is None else error.fault


class Rings:
    """Opens memories and devices, and closes them in the right order."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def memory(self, size: int = 1 << 20, gpa: int = 0x4000_0000, uva: int = 0x7F00_0000_0000) -> GuestMemory:
        return self._stack.enter_context(GuestMemory(size, gpa, uva))

    def device(self, driver: VirtqueueDriver, **how: Any) -> RingDevice:
        """``how``: what ``RingDevice`` takes."""
        device = RingDevice(driver, **how)
        self._stack.callback(device.close)
        return device


@contextmanager
def open_rings() -> Iterator[Rings]:
    """The fixture's content for a hypothesis test, which needs it anew for each example."""
    with ExitStack() as stack:
        yield Rings(stack)


@pytest.fixture
def rings() -> Iterator[Rings]:
    with open_rings() as opened:
        yield opened


def put_one(driver: VirtqueueDriver, desc: Desc) -> None:
    """Make one hand-made descriptor available, whatever stands in it."""
    if isinstance(driver, SplitDriver):
        driver.write_desc(0, desc)
        driver.put_avail(0)
    else:
        assert isinstance(driver, PackedDriver)
        driver.put_descs([desc])


def put_chain(driver: VirtqueueDriver, descs: Sequence[Desc]) -> None:
    """Make these descriptors available as one chain, linked as they should be, with nothing else about them checked."""
    last = len(descs) - 1
    linked = [desc._replace(flags=desc.flags | (1 if i < last else 0)) for i, desc in enumerate(descs)]
    if isinstance(driver, SplitDriver):
        for i, desc in enumerate(linked):
            driver.write_desc(i, desc._replace(link=i + 1 if i < last else 0))
        driver.put_avail(0)
    else:
        assert isinstance(driver, PackedDriver)
        driver.put_descs(linked)


def assert_broken(device: RingDevice, fault: int) -> None:
    """The queue broke now, for this reason, said so once, and stays broken."""
    assert device.pop() == []
    error = device.vq.report().error
    assert isinstance(error, GuestError)
    assert FAULTS[error.fault] == FAULTS[fault]
    assert read_counter(device.event_fd) == 1
    assert device.pop() == []
    assert device.fault == fault
    assert read_counter(device.event_fd) == 0


def read_counter(fd: int) -> int:
    """What a non-blocking eventfd has counted; 0 when nothing."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
