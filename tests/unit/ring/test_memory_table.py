"""Guest memory: what can be mapped, what a table holds, and when it lets go."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from kit.ring.device import FORMATS, Rings, make_driver, region_of

from virtio.dataplane import lib
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.native.memory import Mapping, MemoryTable
from virtio.testing.driver import Element, GuestMemory, SplitDriver
from virtio.waist import AddressSpace, MemoryRegion


def region(fd: int, size: int, offset: int = 0) -> MemoryRegion:
    return MemoryRegion(0, size, 0, offset, OwnedFd(os.dup(fd)))


def memory_file(size: int, name: str = "region") -> OwnedFd:
    fd = OwnedFd(os.memfd_create(name))
    os.ftruncate(fd.fileno(), size)
    return fd


def maps_of(name: str) -> int:
    """How often a memfd of this name is mapped into this process."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(f"/memfd:{name} ")


@pytest.mark.parametrize(
    ("size", "offset"),
    [(4097, 0), (4096, 1), (1, 4096), (8192, 4096), (1 << 40, 0), (4096, 1 << 40)],
)
def test_a_region_that_ends_beyond_its_file_is_refused(size: int, offset: int) -> None:
    with memory_file(4096) as fd, pytest.raises(HostError, match="file ends before the region"):
        Mapping(region(fd.fileno(), size, offset))


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (4096, (1 << 64) - 4096), ((1 << 64) - 1, 1), (1 << 63, 0), (1, (1 << 63) - 1)]
)
def test_a_region_that_is_empty_or_wraps_is_refused(size: int, offset: int) -> None:
    with memory_file(4096) as fd, pytest.raises(HostError) as refused:
        Mapping(region(fd.fileno(), size, offset))
    assert refused.value.errno == errno.EINVAL


def test_what_is_no_regular_file_is_refused() -> None:
    reader, writer = os.pipe()
    event = os.eventfd(0)
    folder = os.open("/", os.O_RDONLY)
    for fd in (reader, writer, event, folder):
        with pytest.raises(HostError, match="not a regular file"):
            Mapping(region(fd, 4096))
        os.close(fd)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "read-only").write_bytes(bytes(4096))
    fd = OwnedFd(os.open(tmp_path / "read-only", os.O_RDONLY))
    with fd, pytest.raises(HostError) as refused:
        Mapping(region(fd.fileno(), 4096))
    assert refused.value.errno == errno.EACCES


@pytest.mark.parametrize("offset", [0, 1, 16, 4095, 4096, 5000])
def test_a_region_may_begin_anywhere_in_its_file(rings: Rings, offset: int) -> None:
    memory = rings.memory(1 << 16)
    driver = SplitDriver(memory, 8)
    begin = (1 << 15) + offset
    regions = [region_of(memory, size=1 << 15), region_of(memory, offset=begin)]
    device = rings.device(driver, regions=regions)
    memory.write(memory.gpa + begin, b"found")
    driver.add_elements([Element(memory.gpa + begin, 5, False)])
    assert [chain.data for chain in device.pop()] == [b"found"]
    driver.add_elements([Element(memory.gpa + memory.size - 5, 6, False)])
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_ADDRESS


@pytest.mark.parametrize("ring", FORMATS)
def test_a_ring_that_is_misaligned_in_our_own_memory_breaks_its_queue(rings: Rings, ring: str) -> None:
    """An aligned guest address in a region that begins at an odd place of its file: atomic words need more."""
    memory = rings.memory(1 << 16)
    driver = make_driver(ring, memory, 8)
    device = rings.device(driver, regions=[region_of(memory, offset=1, size=1 << 15, gpa=memory.gpa)])
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_RING_ADDRESS


def test_509_regions_in_any_order_are_one_memory(rings: Rings) -> None:
    page = 4096
    memory = rings.memory(512 * page)
    driver = SplitDriver(memory, 16)  # its three areas lie in the first page
    order = sorted(range(1, 509), key=lambda i: i * 7919 % 509)
    regions = [region_of(memory, offset=i * page, size=page) for i in [*order, 0]]
    device = rings.device(driver, regions=regions)
    for i in (1, 2, 100, 254, 255, 507, 508):
        gpa = memory.gpa + i * page
        memory.write(gpa, b"page %03d" % i)
        driver.add_elements([Element(gpa, 8, False)])
        (chain,) = device.pop()
        assert chain.data == b"page %03d" % i
        device.push((chain, b""))
        driver.used()
    driver.add_elements([Element(memory.gpa + 509 * page - 1, 2, False)])
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_ADDRESS


@pytest.mark.parametrize("ring", FORMATS)
def test_rings_are_found_by_user_addresses_and_buffers_by_guest_addresses(rings: Rings, ring: str) -> None:
    """vhost-user without an IOMMU: SET_VRING_ADDR has the front-end's addresses, descriptors the guest's."""
    memory = rings.memory()
    driver = make_driver(ring, memory, 8)
    areas = tuple(memory.to_uva(gpa) for gpa in (driver.desc, driver.avail, driver.used_area))
    device = rings.device(driver, areas=areas, space=AddressSpace.UVA)
    token = driver.add([b"x"], [1])
    (chain,) = device.pop()
    device.push((chain, b"y"))
    assert driver.used() == [(token, 1, [b"y"])]
    wrong = rings.device(make_driver(ring, memory, 8), space=AddressSpace.UVA)
    assert wrong.pop() == []
    assert wrong.fault == lib.VQ_FAULT_RING_ADDRESS


def test_memory_is_unmapped_when_the_last_table_and_chain_are_gone(rings: Rings) -> None:
    name = "let-go-of-me"
    with GuestMemory(1 << 16, name=name) as memory:
        driver = SplitDriver(memory, 8)
        device = rings.device(driver)
        driver.add([b"x"], [])
        (chain,) = device.pop()
        assert maps_of(name) == 2  # the driver's and the device's
        unchanged, device.table = device.table, MemoryTable(list(device.table.mappings), device.table)
        assert maps_of(name) == 2  # a region that stays is not mapped again
        before, device.table = device.table, MemoryTable()
        device.vq.set_memory(device.table)
        for kept in before.mappings:
            kept.fd.close()
        del before, unchanged, kept
        assert maps_of(name) == 2  # the chain, and the ring until it is replaced
        device.drop(chain)
        device.vq.forget()
        assert maps_of(name) == 1


def test_more_mappings_than_can_be_guarded_are_refused_and_the_place_is_free_again_later() -> None:
    """16384 of them can be guarded against SIGBUS: 32 devices with 509 memory slots each. None goes without."""
    kept: list[Mapping] = []
    with memory_file(4096) as fd:
        one = region(fd.fileno(), 4096)
        error = 0
        while not error and len(kept) <= 16384:
            try:
                kept.append(Mapping(one))
            except HostError as refused:
                error = refused.errno
        assert error == errno.ENOSPC
        assert len(kept) > 16000
        kept.pop()
        kept.append(Mapping(one))
        kept.clear()
