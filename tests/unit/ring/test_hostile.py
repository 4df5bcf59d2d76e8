"""HOSTILE's checklist, items 1 to 6: each mistake of a driver breaks its queue with the one code that names it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kit.ring.device import F_VERSION_1, FORMATS, Rings, assert_broken, make_driver, put_chain, put_one

from virtio.dataplane import lib
from virtio.testing.driver import Desc, Element, PackedDriver, SplitDriver, VirtqueueDriver

NEXT, WRITE, INDIRECT = 1, 2, 4
SIZE = 8
Mistake = Callable[[VirtqueueDriver], None]


def data(driver: VirtqueueDriver, length: int = 16) -> int:
    """Some guest memory to point to."""
    return driver.memory.allocate(length)


# --- 1 to 4: one chain that must not be ---


def split_next_outside(driver: VirtqueueDriver) -> None:
    driver.write_desc(0, Desc(data(driver), 16, NEXT, SIZE))
    assert isinstance(driver, SplitDriver)
    driver.put_avail(0)


def split_next_far_outside(driver: VirtqueueDriver) -> None:
    driver.write_desc(0, Desc(data(driver), 16, NEXT, 0xFFFF))
    assert isinstance(driver, SplitDriver)
    driver.put_avail(0)


def split_self_loop(driver: VirtqueueDriver) -> None:
    driver.write_desc(3, Desc(data(driver), 16, NEXT, 3))
    assert isinstance(driver, SplitDriver)
    driver.put_avail(3)


def split_long_loop(driver: VirtqueueDriver) -> None:
    for i in range(SIZE):
        driver.write_desc(i, Desc(data(driver), 16, NEXT, (i + 1) % SIZE))
    assert isinstance(driver, SplitDriver)
    driver.put_avail(2)


def packed_loop(driver: VirtqueueDriver) -> None:
    assert isinstance(driver, PackedDriver)
    driver.put_descs([Desc(data(driver), 16, NEXT, 1)] * SIZE)


def split_head_outside(driver: VirtqueueDriver) -> None:
    assert isinstance(driver, SplitDriver)
    driver.put_avail(SIZE)


def split_head_far_outside(driver: VirtqueueDriver) -> None:
    assert isinstance(driver, SplitDriver)
    driver.put_avail(0xFFFF)


def split_avail_jumps(driver: VirtqueueDriver) -> None:
    assert isinstance(driver, SplitDriver)
    driver.set_avail_idx(SIZE + 1)


def split_avail_goes_back(driver: VirtqueueDriver) -> None:
    assert isinstance(driver, SplitDriver)
    driver.set_avail_idx(0xFFFF)


def split_head_again(driver: VirtqueueDriver) -> None:
    assert isinstance(driver, SplitDriver)
    driver.write_desc(5, Desc(data(driver), 16, 0, 0))
    driver.put_avail(5)
    driver.put_avail(5)


def packed_id_again(driver: VirtqueueDriver) -> None:
    assert isinstance(driver, PackedDriver)
    driver.put_descs([Desc(data(driver), 16, 0, 7)])
    driver.put_descs([Desc(data(driver), 16, 0, 7)])


def table_of(*descs: Desc, flags: int = INDIRECT, length: int | None = None) -> Mistake:
    def make(driver: VirtqueueDriver) -> None:
        somewhere = data(driver)
        table = driver.write_table([desc._replace(gpa=somewhere + desc.gpa) for desc in descs])
        put_one(driver, Desc(table, 16 * len(descs) if length is None else length, flags, 0))

    return make


def table_at(distance_from_end: int, length: int) -> Mistake:
    def make(driver: VirtqueueDriver) -> None:
        end = driver.memory.gpa + driver.memory.size
        put_one(driver, Desc(end - distance_from_end, length, INDIRECT, 0))

    return make


def table_wraps(driver: VirtqueueDriver) -> None:
    put_one(driver, Desc((1 << 64) - 16, 32, INDIRECT, 0))


def packed_table_in_chain(driver: VirtqueueDriver) -> None:
    table = driver.write_table([Desc(data(driver), 16, 0, 0)])
    put_chain(driver, [Desc(data(driver), 16, 0, 0), Desc(table, 16, INDIRECT, 0)])


def buffers(*lengths_and_flags: tuple[int, int]) -> Mistake:
    def make(driver: VirtqueueDriver) -> None:
        put_chain(driver, [Desc(data(driver), length, flags, 0) for length, flags in lengths_and_flags])

    return make


def buffer_at(gpa: Callable[[VirtqueueDriver], int], length: int, flags: int = WRITE) -> Mistake:
    return lambda driver: put_one(driver, Desc(gpa(driver), length, flags, 0))


def end(driver: VirtqueueDriver) -> int:
    return driver.memory.gpa + driver.memory.size


GOOD = Desc(0, 8, 0, 0)
BOTH: dict[str, tuple[Mistake, int]] = {
    "table with NEXT": (table_of(GOOD, flags=INDIRECT | NEXT), lib.VQ_FAULT_INDIRECT_NEXT),
    "empty table": (table_of(GOOD, length=0), lib.VQ_FAULT_INDIRECT_SIZE),
    "table of half an entry": (table_of(GOOD, length=8), lib.VQ_FAULT_INDIRECT_SIZE),
    "table of an entry and a byte": (table_of(GOOD, GOOD, length=17), lib.VQ_FAULT_INDIRECT_SIZE),
    "table of 1025 entries": (table_of(GOOD, length=16 * 1025), lib.VQ_FAULT_INDIRECT_SIZE),
    "table of 4 GiB": (table_of(GOOD, length=0xFFFFFFF0), lib.VQ_FAULT_INDIRECT_SIZE),
    "table in a table": (table_of(Desc(0, 16, INDIRECT, 0)), lib.VQ_FAULT_INDIRECT_NESTED),
    "table outside memory": (table_at(-4096, 16), lib.VQ_FAULT_ADDRESS),
    "table over the end of memory": (table_at(8, 16), lib.VQ_FAULT_ADDRESS),
    "table over the end of addresses": (table_wraps, lib.VQ_FAULT_INDIRECT_SIZE),
    "empty buffer in a table": (table_of(Desc(0, 0, 0, 0)), lib.VQ_FAULT_EMPTY_BUFFER),
    "empty buffer": (buffers((0, 0)), lib.VQ_FAULT_EMPTY_BUFFER),
    "empty writable buffer": (buffers((16, 0), (0, WRITE)), lib.VQ_FAULT_EMPTY_BUFFER),
    "readable after writable": (buffers((16, WRITE), (16, 0)), lib.VQ_FAULT_ORDER),
    "readable between writable": (buffers((1, 0), (1, WRITE), (1, 0), (1, WRITE)), lib.VQ_FAULT_ORDER),
    "buffer just outside": (buffer_at(end, 1), lib.VQ_FAULT_ADDRESS),
    "buffer just before": (buffer_at(lambda d: d.memory.gpa - 1, 1), lib.VQ_FAULT_ADDRESS),
    "buffer over the end": (buffer_at(lambda d: end(d) - 16, 17), lib.VQ_FAULT_ADDRESS),
    "buffer over the beginning": (buffer_at(lambda d: d.memory.gpa - 8, 16, 0), lib.VQ_FAULT_ADDRESS),
    "buffer at the end of addresses": (buffer_at(lambda d: (1 << 64) - 8, 8), lib.VQ_FAULT_ADDRESS),
    "buffer that wraps into memory": (buffer_at(lambda d: (1 << 64) - 16, 0xFFFFFFFF, 0), lib.VQ_FAULT_ADDRESS),
    "buffer of 4 GiB": (buffer_at(lambda d: d.memory.gpa, 0xFFFFFFFF), lib.VQ_FAULT_ADDRESS),
}
SPLIT: dict[str, tuple[Mistake, int]] = {
    "next outside the table": (split_next_outside, lib.VQ_FAULT_NEXT),
    "next far outside the table": (split_next_far_outside, lib.VQ_FAULT_NEXT),
    "chain that points to itself": (split_self_loop, lib.VQ_FAULT_CHAIN_LENGTH),
    "chain that loops over the whole queue": (split_long_loop, lib.VQ_FAULT_CHAIN_LENGTH),
    "head outside the table": (split_head_outside, lib.VQ_FAULT_HEAD),
    "head far outside the table": (split_head_far_outside, lib.VQ_FAULT_HEAD),
    "avail index jumped": (split_avail_jumps, lib.VQ_FAULT_AVAIL_INDEX),
    "avail index went back": (split_avail_goes_back, lib.VQ_FAULT_AVAIL_INDEX),
    "next outside an indirect table": (table_of(Desc(0, 8, NEXT, 1)), lib.VQ_FAULT_NEXT),
    "loop in an indirect table": (table_of(Desc(0, 8, NEXT, 1), Desc(0, 8, NEXT, 0)), lib.VQ_FAULT_CHAIN_LENGTH),
}
PACKED: dict[str, tuple[Mistake, int]] = {
    "chain over the whole ring without an end": (packed_loop, lib.VQ_FAULT_CHAIN_LENGTH),
    "table in a chain": (packed_table_in_chain, lib.VQ_FAULT_INDIRECT_NEXT),
}
CASES = [pytest.param("split", *case, id=f"split: {name}") for name, case in (BOTH | SPLIT).items()]
CASES += [pytest.param("packed", *case, id=f"packed: {name}") for name, case in (BOTH | PACKED).items()]


@pytest.mark.parametrize(("ring", "mistake", "fault"), CASES)
def test_pop_breaks_the_queue_with_the_code_of_the_mistake(
    rings: Rings, ring: str, mistake: Mistake, fault: int
) -> None:
    driver = make_driver(ring, rings.memory(1 << 16), SIZE)
    device = rings.device(driver)
    mistake(driver)
    assert_broken(device, fault)


@pytest.mark.parametrize(("ring", "mistake"), [("split", split_head_again), ("packed", packed_id_again)])
def test_what_the_device_still_has_cannot_come_again(rings: Rings, ring: str, mistake: Mistake) -> None:
    driver = make_driver(ring, rings.memory(1 << 16), SIZE)
    device = rings.device(driver)
    mistake(driver)
    chains = device.pop()
    assert len(chains) == 1
    assert_broken(device, lib.VQ_FAULT_HEAD_INFLIGHT)
    device.drop(*chains)


def test_packed_descriptors_that_the_device_still_has_cannot_be_made_available_again(rings: Rings) -> None:
    """2.8.16; under the next lap's wrap counter and with another id they look new."""
    driver = PackedDriver(rings.memory(), SIZE)
    device = rings.device(driver)
    for i in range(SIZE):
        driver.put_descs([Desc(driver.memory.gpa, 16, 0, i)])
    chains = device.pop()
    assert len(chains) == SIZE
    device.push((chains[1], b""))
    driver.put_descs([Desc(driver.memory.gpa, 16, 0, SIZE)])  # in the place that is free again
    chains += device.pop()
    driver.put_descs([Desc(driver.memory.gpa, 16, 0, SIZE + 1)])
    assert_broken(device, lib.VQ_FAULT_AVAIL_INDEX)
    device.drop(chains[0], *chains[2:])


@pytest.mark.parametrize("ring", FORMATS)
def test_a_head_may_come_again_once_the_driver_has_it_back(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(1 << 16), SIZE)
    device = rings.device(driver)
    for _ in range(3 * SIZE):
        put_one(driver, Desc(driver.memory.gpa, 4, WRITE, 5))
        (chain,) = device.pop()
        device.push((chain, b"ok"))
    assert device.fault == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_indirect_descriptor_breaks_the_queue_when_the_feature_was_not_negotiated(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), SIZE)
    device = rings.device(driver, features=F_VERSION_1)
    driver.add([b"x"], [], indirect=True)
    assert_broken(device, lib.VQ_FAULT_INDIRECT_FEATURE)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("ring", FORMATS)
def test_a_chain_of_4_gib_breaks_the_queue(rings: Rings, ring: str, indirect: bool) -> None:
    memory = rings.memory(3 << 30)  # sparse; never touched there
    driver = make_driver(ring, memory, SIZE)
    device = rings.device(driver)
    driver.add_elements([Element(memory.gpa, 1 << 31, False), Element(memory.gpa, 1 << 31, True)], indirect=indirect)
    assert_broken(device, lib.VQ_FAULT_TOTAL_LENGTH)


@pytest.mark.parametrize("ring", FORMATS)
def test_a_chain_of_1025_descriptors_breaks_even_a_larger_queue(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 2048)
    device = rings.device(driver)
    driver.add_elements([Element(driver.memory.gpa, 1, False)] * 1025)
    assert_broken(device, lib.VQ_FAULT_CHAIN_LENGTH)


@pytest.mark.parametrize("size", [1, 2, 32768])
def test_avail_index_may_be_ahead_by_the_queue_size_and_not_by_one_more(rings: Rings, size: int) -> None:
    driver = SplitDriver(rings.memory(2 << 20), size, start=100)
    device = rings.device(driver)
    for i in range(size):
        driver.write_desc(i, Desc(driver.memory.gpa, 1, 0, 0))
        driver.memory.store(driver.avail + 4 + 2 * ((100 + i) % size), 2, i)
    driver.set_avail_idx(100 + size)
    chains = device.pop(size)
    assert len(chains) == size
    device.push(*((chain, b"") for chain in chains))
    driver.set_avail_idx(100 + 2 * size + 1)
    assert_broken(device, lib.VQ_FAULT_AVAIL_INDEX)


# --- 5: packed flags ---


@pytest.mark.parametrize(
    "flags",
    [0, 1 << 7 | 1 << 15, 1 << 15, NEXT | WRITE | INDIRECT, 1 << 7 | 1 << 15 | WRITE],
    ids=["none", "both", "the other lap's", "others only", "both and WRITE"],
)
def test_packed_descriptor_whose_flags_do_not_fit_the_wrap_counter_is_not_available(rings: Rings, flags: int) -> None:
    driver = PackedDriver(rings.memory(), SIZE)
    device = rings.device(driver)
    driver.write_desc(0, Desc(driver.memory.gpa, 16, flags, 0))
    assert device.pop() == []
    assert device.fault == 0
    driver.put_descs([Desc(driver.memory.gpa, 16, 0, 0)])  # and the right ones make it so
    assert len(device.pop()) == 1


def test_packed_descriptors_behind_the_first_are_taken_whatever_their_avail_and_used_bits(rings: Rings) -> None:
    """2.8.6: the first descriptor's flags make the list available; it is all there by then."""
    driver = PackedDriver(rings.memory(), SIZE)
    device = rings.device(driver)
    driver.put_descs([Desc(driver.memory.gpa, 1, NEXT, 0), Desc(driver.memory.gpa, 2, 0, 3)])
    driver.store_flags(1, 0)
    (chain,) = device.pop()
    assert (chain.readable, chain.head) == (3, 3)


# --- broken, and after ---


@pytest.mark.parametrize("ring", FORMATS)
def test_a_broken_queue_is_not_written_to_and_interrupts_nobody(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), SIZE)
    device = rings.device(driver)
    driver.add([b"x"], [4])
    chains = device.pop()
    put_one(driver, Desc(1, 1, 0, 3)) if ring == "packed" else split_head_outside(driver)
    assert device.pop() == []
    assert device.fault != 0
    before = driver.memory.read(driver.desc, 4096)
    device.push((chains[0], 4))
    device.vq.arm()
    device.vq.disarm()
    assert driver.memory.read(driver.desc, 4096) == before
    assert device.interrupts() == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_a_broken_queue_works_again_after_it_was_set_up_anew(rings: Rings, ring: str) -> None:
    memory = rings.memory()
    driver = make_driver(ring, memory, SIZE)
    device = rings.device(driver)
    put_one(driver, Desc(1, 1, 0, 0))
    assert_broken(device, lib.VQ_FAULT_ADDRESS)
    device.driver = fresh = make_driver(ring, memory, SIZE)
    device.areas = (fresh.desc, fresh.avail, fresh.used_area)
    device.start(fresh.base)
    token = fresh.add([b"again"], [2])
    (chain,) = device.pop()
    device.push((chain, b"ok"))
    assert fresh.used() == [(token, 2, [b"ok"])]
    assert device.fault == 0
