"""The IOTLB, seen through a queue behind an IOMMU: what is known is used, what is not is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.ring.device import (
    F_ACCESS_PLATFORM,
    F_INDIRECT_DESC,
    F_VERSION_1,
    FORMATS,
    RingDevice,
    Rings,
    make_driver,
    open_rings,
    read_counter,
    region_of,
)

from virtio.dataplane import lib
from virtio.errors import HostError
from virtio.native.memory import Iotlb
from virtio.testing.driver import Element, GuestMemory, SplitDriver, VirtqueueDriver
from virtio.waist import AddressSpace, IotlbMiss, Permission

FEATURES = F_INDIRECT_DESC | F_VERSION_1 | F_ACCESS_PLATFORM
READ, WRITE = Permission.READ, Permission.WRITE
BOTH = READ | WRITE
FAR = 1 << 44
"""Where the regions claim to be in guest physical memory: an address taken for one of those finds nothing."""


def device_behind_iommu(rings: Rings, driver: VirtqueueDriver) -> RingDevice:
    regions = [region_of(driver.memory, gpa=FAR)]
    return rings.device(driver, features=FEATURES, space=AddressSpace.IOVA, regions=regions)


def learn(device: RingDevice, iova: int, size: int, perm: int = BOTH, uva: int | None = None) -> None:
    """Map iova to the same bytes of the driver's memory, unless ``uva`` says otherwise."""
    device.iotlb.update(iova, size, device.driver.memory.to_uva(iova) if uva is None else uva, perm)


def learn_ring(device: RingDevice) -> None:
    for gpa, size in zip(device.areas, device.driver.area_sizes, strict=True):
        learn(device, gpa, size)


def next_miss(device: RingDevice) -> IotlbMiss | None:
    """Resume, pop, and see what is missing."""
    device.vq.resume()
    device.drop(*device.pop())
    return device.vq.report().miss


@pytest.mark.parametrize("ring", FORMATS)
def test_everything_is_asked_for_once_in_the_order_of_need(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    token = driver.add([b"hello"], [3])
    (buffer,) = driver.in_flight.values()
    readable, writable = buffer.elements
    wanted = [
        *((gpa, size, BOTH) for gpa, size in zip(device.areas, driver.area_sizes, strict=True)),
        (readable.gpa, 5, READ),
        (writable.gpa, 3, WRITE),
    ]
    for gpa, size, perm in wanted:
        device.vq.resume()
        assert device.pop() == []
        assert read_counter(device.event_fd) == 1
        assert device.vq.report().miss == IotlbMiss(gpa, perm)
        assert device.pop() == []  # parked: it neither asks again nor looks at the ring
        assert read_counter(device.event_fd) == 0
        learn(device, gpa, size, perm)
    device.vq.resume()
    (chain,) = device.pop()
    assert chain.data == b"hello"
    device.push((chain, b"abc"))
    assert driver.used() == [(token, 3, [b"abc"])]
    assert device.vq.report().miss is None
    assert device.fault == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_resuming_without_an_answer_asks_again(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    for _ in range(3):
        assert next_miss(device) == IotlbMiss(driver.desc, BOTH)
        assert read_counter(device.event_fd) == 1


@pytest.mark.parametrize("ring", FORMATS)
def test_a_right_that_is_missing_is_asked_for_like_an_address(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    driver.add([], [4])
    (buffer,) = driver.in_flight.values()
    learn(device, buffer.elements[0].gpa, 4, READ)
    assert next_miss(device) == IotlbMiss(buffer.elements[0].gpa, WRITE)
    learn(device, buffer.elements[0].gpa, 4, WRITE)
    device.vq.resume()
    assert len(device.pop()) == 1


@pytest.mark.parametrize("area", [0, 1, 2])
def test_a_ring_needs_both_rights(rings: Rings, area: int) -> None:
    driver = SplitDriver(rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    learn(device, device.areas[area], driver.area_sizes[area], READ)
    assert next_miss(device) == IotlbMiss(device.areas[area], BOTH)


@pytest.mark.parametrize("ring", FORMATS)
def test_an_indirect_table_is_asked_for_too(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    driver.add([b"ab", b"cd"], [], indirect=True)
    (buffer,) = driver.in_flight.values()
    table = buffer.owned[-1][0]
    for element in buffer.elements:
        learn(device, element.gpa, element.length)
    learn(device, table, 16 + 3)
    assert next_miss(device) == IotlbMiss(table + 19, READ)
    learn(device, table, 32)
    device.vq.resume()
    assert [chain.data for chain in device.pop()] == [b"abcd"]


@pytest.mark.parametrize("ring", FORMATS)
def test_what_was_invalidated_is_asked_for_again_and_completions_still_arrive(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn(device, driver.memory.gpa, driver.memory.size)
    tokens = [driver.add([b"x"], [1]) for _ in range(2)]
    chains = device.pop()
    device.iotlb.clear()
    assert next_miss(device) == IotlbMiss(driver.desc, BOTH)
    device.push(*((chain, b"y") for chain in chains))
    assert [used.token for used in driver.used()] == tokens
    learn(device, driver.memory.gpa, driver.memory.size)
    driver.add([b"z"], [])
    device.vq.resume()
    assert [chain.data for chain in device.pop()] == [b"z"]


def test_a_ring_may_be_put_together_from_neighbours_that_lie_together(rings: Rings) -> None:
    driver = SplitDriver(rings.memory(), 16)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    learn(device, driver.desc, 100)
    learn(device, driver.desc + 100, 156)
    assert next_miss(device) is None
    driver.add([], [1])
    assert next_miss(device) == IotlbMiss(next(iter(driver.in_flight.values())).elements[0].gpa, WRITE)


def test_a_ring_that_lies_in_pieces_of_less_than_a_page_breaks_the_queue(rings: Rings) -> None:
    driver = SplitDriver(rings.memory(), 16)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    learn(device, driver.desc, 128)
    learn(device, driver.desc + 128, 128, uva=driver.memory.uva + 0x8000)
    assert next_miss(device) is None
    assert device.fault == lib.VQ_FAULT_RING_PIECES


@pytest.mark.parametrize("ring", FORMATS)
def test_a_translation_to_where_no_memory_is_breaks_the_queue(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    driver.add_elements([Element(0x5000, 16, False)])
    learn(device, 0x5000, 4096, uva=driver.memory.uva - 4096)
    assert next_miss(device) is None
    assert device.fault == lib.VQ_FAULT_ADDRESS


@pytest.mark.parametrize("ring", FORMATS)
def test_a_buffer_at_the_very_end_of_addresses_can_be_mapped(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    memory = driver.memory
    memory.write(memory.gpa + 0x9000, b"the end.")
    last = (1 << 64) - 4096
    learn(device, last, 1 << 60, uva=memory.uva + 0x8000)  # cut at the end of addresses, not wrapped
    driver.add_elements([Element(last + 4000, 90, False)])
    device.vq.resume()
    assert len(device.pop()) == 1
    driver.add_elements([Element(0x10, 1, False)])
    assert next_miss(device) == IotlbMiss(0x10, READ)


@pytest.mark.parametrize("ring", FORMATS)
@pytest.mark.parametrize("how", ["invalidate all", "invalidate the end", "clear"])
def test_the_last_byte_of_all_addresses_can_be_mapped_and_unmapped(rings: Rings, ring: str, how: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    memory = driver.memory
    last = (1 << 64) - 1
    memory.write(memory.gpa + 0x9000, b"z")
    learn(device, last, 1, uva=memory.uva + 0x9000)
    driver.add_elements([Element(last, 1, False)])
    device.vq.resume()
    (chain,) = device.pop()
    assert chain.data == b"z"
    device.drop(chain)
    if how == "clear":
        device.iotlb.clear()
    else:
        device.iotlb.invalidate(*((0, last) if how == "invalidate all" else (last - 4095, 4096)))
    learn_ring(device)
    driver.add_elements([Element(last, 1, False)])
    assert next_miss(device) == IotlbMiss(last, READ)


@pytest.mark.parametrize("ring", FORMATS)
def test_a_buffer_in_too_many_pieces_is_not_said_to_be_outside_memory(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    memory = driver.memory
    for page in range(16_400):  # the same page again and again: none of them lies behind the one before it
        learn(device, (1 << 40) + page * 4096, 4096, uva=memory.uva + 0x8000)
    driver.add_elements([Element(1 << 40, 16_400 * 4096, True)])
    device.vq.resume()
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_PIECES
    assert "lies in too many pieces" in str(device.vq.report().error)


@pytest.mark.parametrize(
    ("size", "uva", "perm"), [(0, 0, BOTH), (4096, 0, 0), (4096, 0, 4), (4096, (1 << 64) - 4095, BOTH)]
)
def test_updates_that_mean_nothing_are_refused(size: int, uva: int, perm: int) -> None:
    with pytest.raises(HostError, match="IOTLB update"):
        Iotlb().update(0x1000, size, uva, perm)


def test_a_front_end_that_never_takes_back_cannot_fill_our_memory(rings: Rings) -> None:
    """65536 translations are kept; the next one starts over, and what is needed is asked for again."""
    driver = SplitDriver(rings.memory(), 8)
    device = device_behind_iommu(rings, driver)
    learn_ring(device)
    assert next_miss(device) is None
    for i in range(65536 - 3):
        device.iotlb.update(FAR + i * 4096, 4096, 0, BOTH)
    assert next_miss(device) is None
    device.iotlb.update(0, 4096, 0, BOTH)
    assert next_miss(device) == IotlbMiss(driver.desc, BOTH)


@dataclass(frozen=True)
class Entry:
    first: int
    last: int
    offset: int  # in the memory the driver sees
    perm: int


SPAN = 256
"""Addresses and bytes of memory that the model test plays with."""
STEP = st.one_of(
    st.tuples(st.just("update"), st.integers(0, SPAN - 1), st.integers(1, 80), st.integers(0, SPAN), st.integers(1, 3)),
    st.tuples(st.just("invalidate"), st.integers(0, SPAN - 1), st.integers(0, 40), st.just(0), st.just(0)),
    st.tuples(st.just("look"), st.integers(0, SPAN - 1), st.integers(1, 90), st.just(0), st.integers(1, 2)),
)


@settings(deadline=None)
@given(steps=st.lists(STEP, min_size=1, max_size=30))
def test_translations_are_those_of_a_plain_list(steps: list[tuple[str, int, int, int, int]]) -> None:
    """An update or invalidation drops every entry it touches; a look-up goes over neighbours and stops where the first
    byte is not known, or may not be used so."""
    with open_rings() as rings:
        memory = rings.memory(1 << 16)
        driver = SplitDriver(memory, 8)
        device = device_behind_iommu(rings, driver)
        learn_ring(device)
        playground = memory.allocate(2 * SPAN)
        content = bytes(i * 37 % 256 for i in range(2 * SPAN))
        memory.write(playground, content)
        entries: list[Entry] = []
        for what, at, size, offset, perm in steps:
            last = at + size - 1
            if what == "look":
                look(device, entries, at, size, write=perm == 2, content=content)
                continue
            if size:
                entries = [entry for entry in entries if entry.last < at or entry.first > last]
            if what == "update":
                device.iotlb.update(at, size, memory.to_uva(playground) + offset, perm)
                entries.append(Entry(at, last, offset, perm))
            else:
                device.iotlb.invalidate(at, size)


def look(device: RingDevice, entries: list[Entry], at: int, size: int, *, write: bool, content: bytes) -> None:
    """Have the device take a buffer at these addresses, and compare."""
    need = WRITE if write else READ
    expected = bytearray()
    missing = None
    for iova in range(at, at + size):
        entry = next((e for e in entries if e.first <= iova <= e.last), None)
        if entry is None or not entry.perm & need:
            missing = iova
            break
        expected.append(content[entry.offset + iova - entry.first])
    driver: VirtqueueDriver = device.driver
    driver.add_elements([Element(at, size, write)])
    device.vq.resume()
    chains = device.pop()
    assert device.fault == 0
    miss = device.vq.report().miss
    if missing is not None:
        assert (chains, miss) == ([], IotlbMiss(missing, need))
        driver_takes_back(driver)
        return
    assert miss is None
    (chain,) = chains
    if write:
        assert chain.room == size
    else:
        assert chain.data == bytes(expected)
    device.push((chain, b""))
    driver.in_flight.clear()
    assert isinstance(driver, SplitDriver)
    driver.last_used = driver.used_idx
    driver._free = list(range(driver.size))


def driver_takes_back(driver: VirtqueueDriver) -> None:
    """Un-publish the one buffer nobody took: no driver may, but the device has not seen it."""
    assert isinstance(driver, SplitDriver)
    driver.in_flight.clear()
    driver._free = list(range(driver.size))
    driver.avail_idx = (driver.avail_idx - 1) & 0xFFFF
    driver.publish()


def test_without_the_feature_addresses_are_the_guests(rings: Rings) -> None:
    memory: GuestMemory = rings.memory()
    driver = SplitDriver(memory, 8)
    device = rings.device(driver)
    learn(device, memory.gpa, memory.size, uva=0)
    driver.add([b"plain"], [])
    assert [chain.data for chain in device.pop()] == [b"plain"]
