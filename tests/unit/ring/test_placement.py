"""HOSTILE's checklist, item 6: rings that lie where no ring can, sizes and positions that cannot be."""

from __future__ import annotations

import pytest
from kit.ring.device import FORMATS, Rings, assert_broken, make_driver, region_of

from virtio.dataplane import FAULTS, lib
from virtio.errors import GuestError, PeerError
from virtio.native.memory import MemoryTable
from virtio.testing.driver import PackedDriver, SplitDriver

SIZE = 8


def area_sizes(ring: str, size: int) -> tuple[int, int, int]:
    return (16 * size, 6 + 2 * size, 6 + 8 * size) if ring == "split" else (16 * size, 4, 4)


@pytest.mark.parametrize("area", [0, 1, 2], ids=["desc", "avail", "used"])
@pytest.mark.parametrize("ring", FORMATS)
def test_a_ring_may_end_with_the_last_byte_of_memory_and_not_one_later(rings: Rings, ring: str, area: int) -> None:
    memory = rings.memory(1 << 16)
    align = (16, 4, 4)[area]
    length = area_sizes(ring, SIZE)[area]
    for beyond, fault in ((0, 0), (align, lib.VQ_FAULT_RING_ADDRESS)):
        driver = make_driver(ring, memory, SIZE)
        areas = [driver.desc, driver.avail, driver.used_area]
        last = memory.gpa + memory.size - length
        areas[area] = last - last % align + (align if last % align and beyond else beyond)
        device = rings.device(driver, areas=tuple(areas))
        assert device.pop() == []
        assert device.fault == fault


@pytest.mark.parametrize("address", [0, 1 << 40, (1 << 64) - 16, (1 << 64) - 4096])
@pytest.mark.parametrize("area", [0, 1, 2], ids=["desc", "avail", "used"])
@pytest.mark.parametrize("ring", FORMATS)
def test_a_ring_outside_memory_breaks_the_queue(rings: Rings, ring: str, area: int, address: int) -> None:
    driver = make_driver(ring, rings.memory(), SIZE)
    areas = [driver.desc, driver.avail, driver.used_area]
    areas[area] = address
    device = rings.device(driver, areas=tuple(areas))
    assert_broken(device, lib.VQ_FAULT_RING_ADDRESS)


@pytest.mark.parametrize("ring", FORMATS)
def test_a_ring_that_crosses_regions_in_the_middle_of_a_page_breaks_the_queue(rings: Rings, ring: str) -> None:
    """No front-end's region ends there; rings that cross at a page's end are in test_ring_scattered.py."""
    memory = rings.memory(1 << 16)
    driver = make_driver(ring, memory, 16)
    border = driver.desc + 128 - memory.gpa
    regions = [region_of(memory, size=border), region_of(memory, offset=border)]
    assert_broken(rings.device(driver, regions=regions), lib.VQ_FAULT_RING_PIECES)


@pytest.mark.parametrize("ring", FORMATS)
def test_a_queue_breaks_when_its_ring_is_no_longer_in_memory(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), SIZE)
    device = rings.device(driver)
    driver.add([b"x"], [1])
    (chain,) = device.pop()
    device.vq.set_memory(MemoryTable())
    assert device.fault == lib.VQ_FAULT_RING_ADDRESS
    device.push((chain, b"y"))  # the chain keeps its memory, but the ring is not written any more
    assert driver.used() == []


@pytest.mark.parametrize("ring", FORMATS)
def test_overlapping_ring_areas_harm_nobody_but_the_queue(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(1 << 16), SIZE)
    driver.memory.write(driver.desc, bytes(range(1, 129)))
    # Both indices of the split ring are 0x0403: the base lies ahead of them, where it could be.
    base = 0x0404 if ring == "split" else 0x8000_8000
    device = rings.device(driver, areas=(driver.desc, driver.desc, driver.desc), base=base)
    for _ in range(20):
        chains = device.pop()
        device.push(*((chain, b"") for chain in chains))
    assert device.fault in FAULTS or ring == "packed"


@pytest.mark.parametrize("size", [0, 3, 24, 32769, 65535, 65536, 0xFFFFFFFF])
def test_split_queue_sizes_that_cannot_be_are_refused(rings: Rings, size: int) -> None:
    with pytest.raises(PeerError, match=f"size {size}"):
        rings.device(SplitDriver(rings.memory(), SIZE), size=size)


@pytest.mark.parametrize("size", [0, 32769, 65536, 0xFFFFFFFF])
def test_packed_queue_sizes_that_cannot_be_are_refused(rings: Rings, size: int) -> None:
    with pytest.raises(PeerError, match=f"size {size}"):
        rings.device(PackedDriver(rings.memory(), SIZE), size=size, base=0x8000_8000)


@pytest.mark.parametrize(("area", "off"), [(0, 8), (0, 1), (1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("ring", FORMATS)
def test_misaligned_ring_addresses_are_refused_as_the_drivers_mistake(
    rings: Rings, ring: str, area: int, off: int
) -> None:
    driver = make_driver(ring, rings.memory(), SIZE)
    areas = [driver.desc, driver.avail, driver.used_area]
    areas[area] += off
    with pytest.raises(GuestError, match="aligned"):
        rings.device(driver, areas=tuple(areas))


def test_packed_avail_area_wants_4_bytes_where_split_wants_2(rings: Rings) -> None:
    memory = rings.memory()
    for ring in FORMATS:
        driver = make_driver(ring, memory, SIZE)
        areas = (driver.desc, driver.avail + 2, driver.used_area)
        if ring == "packed":
            with pytest.raises(GuestError, match="aligned"):
                rings.device(driver, areas=areas)
        else:
            assert rings.device(driver, areas=areas).pop() == []


@pytest.mark.parametrize(
    ("ring", "base"),
    [
        ("split", 0x10000),
        ("split", 0xFFFFFFFF),
        ("packed", 0x8000_8008),  # a descriptor beyond the ring
        ("packed", 0x8008_8000),
        ("packed", 0x8003_8001),  # used before it was available
        ("packed", 0x8000_0001),  # more than the ring in flight
    ],
)
def test_a_base_that_cannot_be_is_refused(rings: Rings, ring: str, base: int) -> None:
    with pytest.raises(PeerError, match=f"base {base:#x}"):
        rings.device(make_driver(ring, rings.memory(), SIZE), base=base)


def test_packed_base_may_give_the_avail_position_alone(rings: Rings) -> None:
    """As DPDK's front-ends do: the used position is then the same."""
    driver = PackedDriver(rings.memory(), SIZE, start=3)
    device = rings.device(driver, base=0x8003)
    assert device.vq.base == 0x8003_8003
    driver.add([b"x"], [])
    assert [chain.data for chain in device.pop()] == [b"x"]
