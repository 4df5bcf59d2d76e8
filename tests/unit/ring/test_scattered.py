"""Rings whose pages are adjacent by their addresses and lie apart in our memory: behind an IOMMU, and across regions.

In most tests each page of the driver's memory is a memory region of its own, mapped apart from its neighbours; in
``Shuffled`` memory the pages of one region are mixed up, as a virtual IOMMU does it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from kit.ring.device import (
    F_ACCESS_PLATFORM,
    F_INDIRECT_DESC,
    F_VERSION_1,
    FORMATS,
    RingDevice,
    Rings,
    make_driver,
    read_counter,
    region_of,
)

from virtio.dataplane import ffi, lib
from virtio.native.memory import MemoryTable, install_sigbus_guard
from virtio.testing.driver import Element, GuestMemory, VirtqueueDriver
from virtio.waist import AddressSpace, IotlbMiss, MemoryRegion, Permission

PAGE = 4096
FEATURES = F_INDIRECT_DESC | F_VERSION_1 | F_ACCESS_PLATFORM
BOTH = Permission.READ | Permission.WRITE
FAR = 1 << 44
SIZES = (512, 1024, 4096, 32768)


def scattered(memory: GuestMemory, *, behind_iommu: bool = False) -> list[MemoryRegion]:
    """Every page a region of its own. Behind an IOMMU their user addresses are mixed up as well."""
    pages = memory.size // PAGE
    regions = []
    for page in range(pages):
        region = region_of(memory, offset=page * PAGE, size=PAGE)
        if behind_iommu:
            region = MemoryRegion(FAR + page * PAGE, PAGE, uva_of(memory, page), region.offset, region.fd)
        regions.append(region)
    return regions


def uva_of(memory: GuestMemory, page: int) -> int:
    """Behind the IOMMU: the user address of that page of the driver's memory."""
    pages = memory.size // PAGE
    return memory.uva + (pages - 1 - page) * PAGE


def learn(device: RingDevice, first: int, size: int, perm: int = BOTH) -> None:
    """Translate these pages, each to where it lies."""
    memory = device.driver.memory
    for iova in range(first & -PAGE, first + size, PAGE):
        device.iotlb.update(iova, PAGE, uva_of(memory, (iova - memory.gpa) // PAGE), perm)


def learn_all(device: RingDevice) -> None:
    learn(device, device.driver.memory.gpa, device.driver.memory.size)


def behind_iommu(rings: Rings, driver: VirtqueueDriver) -> RingDevice:
    regions = scattered(driver.memory, behind_iommu=True)
    return rings.device(driver, features=FEATURES, space=AddressSpace.IOVA, regions=regions)


def pages_are_apart(device: RingDevice) -> bool:
    """Two neighbours among the pages of the descriptors lie apart in our memory."""
    memory = device.driver.memory
    at = {
        region.offset // PAGE: int(ffi.cast("uintptr_t", lib.mapping_base(mapping.pointer)))
        for region, mapping in device.table.mappings.items()
    }
    first = (device.driver.desc - memory.gpa) // PAGE
    last = (device.driver.desc + device.driver.area_sizes[0] - 1 - memory.gpa) // PAGE
    return any(at[page + 1] != at[page] + PAGE for page in range(first, last))


def open_device(rings: Rings, driver: VirtqueueDriver, space: AddressSpace) -> RingDevice:
    """With all of its memory scattered, and known where there is an IOMMU."""
    if space is AddressSpace.IOVA:
        device = behind_iommu(rings, driver)
        learn_all(device)
        return device
    offset = driver.memory.uva - driver.memory.gpa if space is AddressSpace.UVA else 0
    areas = (driver.desc + offset, driver.avail + offset, driver.used_area + offset)
    return rings.device(driver, regions=scattered(driver.memory), space=space, areas=areas)


def go_round(driver: VirtqueueDriver, device: RingDevice, count: int) -> None:
    """``count`` buffers of two pieces, so many at a time as the ring holds, each with a content of its own."""
    memory = driver.memory
    batch_max = driver.size // 2
    room = memory.allocate(16 * batch_max)
    sent = 0
    while sent < count:
        batch = min(batch_max, count - sent)
        tokens = {}
        for i in range(batch):
            memory.write(room + 16 * i, b"%08d" % (sent + i))
            pieces = [Element(room + 16 * i, 8, False), Element(room + 16 * i + 8, 8, True)]
            tokens[driver.add_elements(pieces, publish=False)] = sent + i
        driver.publish()
        chains = device.pop(batch)
        assert [chain.data for chain in chains] == [b"%08d" % (sent + i) for i in range(batch)]
        device.push(*((chain, chain.data[::-1]) for chain in chains))
        for used in driver.used():
            number = tokens.pop(used.token)
            assert (used.written, used.buffers) == (8, [(b"%08d" % number)[::-1]])
        assert not tokens
        sent += batch
    memory.release(room, 16 * batch_max)
    assert device.fault == 0


class Shuffled(GuestMemory):
    """The driver's pages lie in the file, and so in the one region, in reverse order."""

    def place(self, gpa: int) -> int:
        page, within = divmod(gpa - self.gpa, PAGE)
        return self.gpa + self.size - (page + 1) * PAGE + within

    def read(self, gpa: int, length: int) -> bytes:
        return b"".join(super(Shuffled, self).read(self.place(at), size) for at, size in _by_page(gpa, length))

    def write(self, gpa: int, data: bytes) -> None:
        for at, size in _by_page(gpa, len(data)):
            super().write(self.place(at), data[at - gpa : at - gpa + size])

    def load(self, gpa: int, width: int) -> int:
        return super().load(self.place(gpa), width)

    def store(self, gpa: int, width: int, value: int) -> None:
        super().store(self.place(gpa), width, value)


def _by_page(first: int, length: int) -> Iterator[tuple[int, int]]:
    at, end = first, first + length
    while at < end:
        size = min(PAGE - at % PAGE, end - at)
        yield at, size
        at += size


@pytest.mark.parametrize("size", [1024, 4096])
@pytest.mark.parametrize("ring", FORMATS)
def test_the_pages_of_a_ring_may_lie_in_any_order_in_one_region(rings: Rings, ring: str, size: int) -> None:
    """So it is also where that region is made of huge pages, of which none can be mapped in part."""
    memory = Shuffled((size * 42 // PAGE + 8) * PAGE)
    with memory:
        driver = make_driver(ring, memory, size)
        region = region_of(memory, gpa=FAR)
        device = rings.device(driver, features=FEATURES, space=AddressSpace.IOVA, regions=[region])
        for iova in range(memory.gpa, memory.gpa + memory.size, PAGE):
            device.iotlb.update(iova, PAGE, memory.to_uva(memory.place(iova)), BOTH)
        go_round(driver, device, size + size // 4)


def memory_for(rings: Rings, size: int) -> GuestMemory:
    return rings.memory((size * 26 // PAGE + size * 16 // PAGE + 8) * PAGE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ring", FORMATS)
def test_a_ring_behind_an_iommu_may_lie_in_pages_apart(rings: Rings, ring: str, size: int) -> None:
    driver = make_driver(ring, memory_for(rings, size), size)
    device = open_device(rings, driver, AddressSpace.IOVA)
    assert pages_are_apart(device)
    go_round(driver, device, size + size // 4)  # twice over the ring and more, as each takes two descriptors


@pytest.mark.parametrize("space", [AddressSpace.GPA, AddressSpace.UVA], ids=lambda space: space.name.lower())
@pytest.mark.parametrize("ring", FORMATS)
def test_a_ring_may_cross_from_one_region_into_the_next(rings: Rings, ring: str, space: AddressSpace) -> None:
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    device = open_device(rings, driver, space)
    assert pages_are_apart(device)
    go_round(driver, device, 1280)


@pytest.mark.parametrize("ring", FORMATS)
def test_kicks_and_interrupts_are_asked_for_in_scattered_rings_too(rings: Rings, ring: str) -> None:
    """With EVENT_IDX both wishes of a split ring lie at the ends of their areas, 2.7.6 and 2.7.8."""
    driver = make_driver(ring, memory_for(rings, 1024), 1024, event_idx=True)
    device = open_device(rings, driver, AddressSpace.IOVA)
    assert pages_are_apart(device)
    driver.want_interrupts(True)
    assert device.vq.arm()
    driver.add([b"a"], [1])
    assert driver.needs_kick()
    driver.add([b"b"], [1])
    assert not driver.needs_kick()
    first, second = device.pop()
    device.push((first, b"x"))
    assert device.interrupts() == 1
    device.push((second, b"y"))
    assert device.interrupts() == 0
    assert len(driver.used()) == 2


@pytest.mark.parametrize("right", ["unknown", "read", "write"])
@pytest.mark.parametrize("ring", FORMATS)
def test_a_page_in_the_middle_that_may_not_be_used_is_asked_for(rings: Rings, ring: str, right: str) -> None:
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    device = behind_iommu(rings, driver)
    learn_all(device)
    middle = (driver.desc + 2 * PAGE) & -PAGE
    device.iotlb.invalidate(middle, PAGE)
    if right != "unknown":
        learn(device, middle, PAGE, Permission[right.upper()])
    driver.add([b"x"], [])
    assert device.pop() == []
    assert device.vq.report().miss == IotlbMiss(middle, BOTH)
    assert device.fault == 0
    learn(device, middle, PAGE)
    device.vq.resume()
    assert [chain.data for chain in device.pop()] == [b"x"]


@pytest.mark.parametrize("ring", FORMATS)
def test_completions_still_arrive_in_a_scattered_ring_that_was_invalidated(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    device = open_device(rings, driver, AddressSpace.IOVA)
    tokens = [driver.add([b"x"], [1]) for _ in range(400)]
    chains = device.pop(400)
    device.iotlb.invalidate((driver.desc + PAGE) & -PAGE, PAGE)
    device.push(*((chain, b"y") for chain in chains[:200]))
    assert device.pop() == []  # it waits for the answer now
    device.push(*((chain, b"y") for chain in chains[200:]))
    assert [used.token for used in driver.used()] == tokens
    learn_all(device)
    device.vq.resume()
    go_round(driver, device, 1024)


@pytest.mark.parametrize("ring", FORMATS)
def test_a_page_that_moves_is_written_where_it_is_from_then_on(rings: Rings, ring: str) -> None:
    """The guest gives a page of its ring another place: what is used after that appears there and nowhere else."""
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    memory = driver.memory
    written = driver.desc if ring == "packed" else driver.used_area
    at = written & -PAGE
    elsewhere = rings.memory(PAGE, gpa=1 << 45, uva=0x7E00_0000_0000)
    regions = [*scattered(memory, behind_iommu=True), region_of(elsewhere)]
    device = rings.device(driver, features=FEATURES, space=AddressSpace.IOVA, regions=regions)
    learn_all(device)
    driver.add([b"before"], [1])
    (chain,) = device.pop()
    elsewhere.write(elsewhere.gpa, memory.read(at, PAGE))
    old = memory.read(at, PAGE)
    device.iotlb.update(at, PAGE, elsewhere.uva, BOTH)
    assert device.pop() == []
    device.push((chain, b"y"))
    assert memory.read(at, PAGE) == old
    assert elsewhere.read(elsewhere.gpa, PAGE) != old
    assert device.fault == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_a_ring_may_be_scattered_and_brought_together_again(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    memory = driver.memory
    together = region_of(memory, gpa=FAR - memory.size)
    together = MemoryRegion(together.gpa, together.size, 0x7E00_0000_0000, together.offset, together.fd)
    regions = [*scattered(memory, behind_iommu=True), together]
    device = rings.device(driver, features=FEATURES, space=AddressSpace.IOVA, regions=regions)
    for _ in range(3):
        learn_all(device)
        go_round(driver, device, 600)
        device.iotlb.update(memory.gpa, memory.size, together.uva, BOTH)
        go_round(driver, device, 600)


@pytest.mark.parametrize("space", [AddressSpace.GPA, AddressSpace.UVA], ids=lambda space: space.name.lower())
@pytest.mark.parametrize("ring", FORMATS)
def test_memory_may_be_exchanged_under_a_scattered_ring(rings: Rings, ring: str, space: AddressSpace) -> None:
    """The same bytes, mapped once more: the old mappings are gone, and nothing is written to them."""
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    device = open_device(rings, driver, space)
    driver.add([b"kept"], [4])
    (chain,) = device.pop()
    before, device.table = device.table, MemoryTable(scattered(driver.memory))
    device.vq.set_memory(device.table)
    device.push((chain, b"done"))
    for region in before.mappings:
        region.fd.close()
    del before
    (used,) = driver.used()
    assert used.buffers == [b"done"]
    go_round(driver, device, 1024)


@pytest.mark.parametrize("ring", FORMATS)
def test_a_scattered_ring_that_lost_a_page_breaks_its_queue(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    regions = scattered(driver.memory)
    lost = (driver.desc - driver.memory.gpa) // PAGE + 1
    regions.pop(lost).fd.close()
    device = rings.device(driver, regions=regions)
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_RING_ADDRESS


@pytest.mark.parametrize("space", [AddressSpace.GPA, AddressSpace.IOVA], ids=lambda space: space.name.lower())
@pytest.mark.parametrize("ring", FORMATS)
def test_a_scattered_ring_whose_file_is_cut_breaks_its_queue_alone(
    rings: Rings, ring: str, space: AddressSpace
) -> None:
    install_sigbus_guard()
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    device = open_device(rings, driver, space)
    neighbour_driver = make_driver(ring, memory_for(rings, 1024), 1024)
    neighbour = open_device(rings, neighbour_driver, space)
    driver.add([b"x"], [1])
    (chain,) = device.pop()
    os.ftruncate(driver.memory.fd, 0)
    device.push((chain, b"y"))
    device.vq.arm()
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_MEMORY_GONE
    assert read_counter(device.event_fd) == 1
    go_round(neighbour_driver, neighbour, 1024)


@pytest.mark.parametrize("ring", FORMATS)
def test_pieces_smaller_than_a_page_break_the_queue_with_a_reason_of_their_own(rings: Rings, ring: str) -> None:
    """No IOMMU scatters by less than 4 KiB."""
    driver = make_driver(ring, memory_for(rings, 1024), 1024)
    device = behind_iommu(rings, driver)
    learn_all(device)
    middle = (driver.desc + 2 * PAGE) & -PAGE
    memory = driver.memory
    device.iotlb.update(middle + 1024, 1024, memory.uva, BOTH)
    learned = uva_of(memory, (middle - memory.gpa) // PAGE)
    device.iotlb.update(middle, 1024, learned, BOTH)
    device.iotlb.update(middle + 2048, 2048, learned + 2048, BOTH)
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_RING_PIECES
    assert "smaller than a page" in str(device.vq.report().error)
