"""Rings that are used as they should be, in both formats: what goes in comes out, once, with the right content."""

from __future__ import annotations

import pytest
from kit.ring.device import FORMATS, Rings, make_driver, put_one, region_of

from virtio.dataplane import lib
from virtio.native.memory import MemoryTable
from virtio.testing.driver import Desc, Element, PackedDriver, RingFullError, SplitDriver

NEXT, WRITE, INDIRECT = 1, 2, 4


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("ring", FORMATS)
def test_device_sees_readable_pieces_in_order_and_its_writes_fill_writable_ones(
    rings: Rings, ring: str, indirect: bool
) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    token = driver.add([b"first ", b"second"], [3, 5], indirect=indirect)
    (chain,) = device.pop()
    assert (chain.data, chain.room) == (b"first second", 8)
    device.push((chain, b"abcdefg"))
    assert driver.used() == [(token, 7, [b"abc", b"defg\0"])]
    assert driver.free_slots == 8
    assert device.fault == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_pop_answers_nothing_for_an_empty_ring(rings: Rings, ring: str) -> None:
    device = rings.device(make_driver(ring, rings.memory(), 4))
    assert device.pop() == []
    assert device.fault == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_nothing_is_seen_before_the_driver_publishes(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    driver.add([b"a", b"b"], [], publish=False)
    driver.add([b"c"], [], publish=False)
    assert device.pop() == []
    driver.publish()
    assert [chain.data for chain in device.pop()] == [b"ab", b"c"]


@pytest.mark.parametrize("ring", FORMATS)
def test_buffers_may_be_used_in_another_order_than_they_came(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    tokens = [driver.add([bytes([i])] * (1 + i % 2), [1]) for i in range(3)]
    chains = device.pop()
    for i in (2, 0, 1):
        device.push((chains[i], bytes([i])))
    assert [(u.token, u.buffers) for u in driver.used()] == [(tokens[i], [bytes([i])]) for i in (2, 0, 1)]


@pytest.mark.parametrize("size", [1, 2, 4, 256])
@pytest.mark.parametrize("ring", FORMATS)
def test_a_ring_may_be_used_to_its_last_descriptor_many_laps(rings: Rings, ring: str, size: int) -> None:
    driver = make_driver(ring, rings.memory(), size)
    device = rings.device(driver)
    for lap in range(5):
        tokens = [driver.add([], [2]) for _ in range(size)]
        with pytest.raises(RingFullError):
            driver.add([], [2])
        device.push(*((chain, bytes([lap, i % 256])) for i, chain in enumerate(device.pop(size))))
        assert [(u.token, u.buffers[0]) for u in driver.used()] == [
            (token, bytes([lap, i % 256])) for i, token in enumerate(tokens)
        ]


@pytest.mark.parametrize("size", [3, 5, 7])
def test_a_packed_ring_need_not_be_a_power_of_two_and_chains_cross_its_end(rings: Rings, size: int) -> None:
    driver = make_driver("packed", rings.memory(), size)
    device = rings.device(driver)
    for lap in range(4 * size):
        token = driver.add([bytes([lap])], [1])
        (chain,) = device.pop()
        assert chain.data == bytes([lap])
        device.push((chain, b"!"))
        assert driver.used() == [(token, 1, [b"!"])]
    assert device.fault == 0


@pytest.mark.parametrize("start", [0xFFF0, 0xFFFF, 0x7FFF, 300])
def test_split_indices_run_over_their_16_bits(rings: Rings, start: int) -> None:
    driver = SplitDriver(rings.memory(), 16, start=start)
    device = rings.device(driver)
    for i in range(50):
        token = driver.add([bytes([i])], [1])
        (chain,) = device.pop()
        device.push((chain, chain.data))
        assert driver.used() == [(token, 1, [bytes([i])])]
    assert device.vq.base == (start + 50) % 65536


@pytest.mark.parametrize("ring", FORMATS)
def test_the_base_of_a_stopped_queue_is_where_another_device_goes_on(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 5 if ring == "packed" else 4)
    base = driver.base
    for i in range(23):
        device = rings.device(driver, base=base)
        token = driver.add([b"x"] * (1 + i % 2), [1])
        (chain,) = device.pop()
        device.push((chain, bytes([i])))
        assert driver.used() == [(token, 1, [bytes([i])])]
        base = device.vq.base
        assert base == driver.base


@pytest.mark.parametrize("ring", FORMATS)
def test_the_base_counts_what_was_taken_even_when_it_was_not_used_yet(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    driver.add([b"a", b"b"], [])
    (chain,) = device.pop()
    assert device.vq.base == (1 if ring == "split" else 0x8000_8002)
    device.push((chain, b""))
    assert device.vq.base == (1 if ring == "split" else 0x8002_8002)


@pytest.mark.parametrize("ring", FORMATS)
def test_chains_that_are_rewound_are_popped_again(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 10 if ring == "packed" else 16)
    device = rings.device(driver)
    for _ in range(5):  # over the end of the ring, too
        tokens = [driver.add([bytes([i])] * (1 + i % 2), [1]) for i in range(3)]
        first, *rest = device.pop()
        device.vq.rewind([chain.pointer for chain in rest])
        again = device.pop()
        assert [chain.data for chain in again] == [b"\1\1", b"\2"]
        device.push(*((chain, b"k") for chain in [first, *again]))
        assert [used.token for used in driver.used()] == tokens
    assert device.fault == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_a_buffer_may_cross_from_one_memory_region_into_the_next(rings: Rings, ring: str) -> None:
    memory = rings.memory(1 << 20)
    regions = [region_of(memory, size=1 << 16), region_of(memory, offset=1 << 16, size=1 << 16)]
    driver = make_driver(ring, memory, 8)
    device = rings.device(driver, regions=regions)
    border = memory.gpa + (1 << 16)
    memory.write(border - 3, b"across")
    token = driver.add_elements([Element(border - 3, 6, False), Element(border - 100, 200, True)])
    (chain,) = device.pop()
    assert chain.data == b"across"
    answer = bytes(range(200))
    device.push((chain, answer))
    assert driver.used() == [(token, 200, [answer])]


@pytest.mark.parametrize("ring", FORMATS)
def test_an_indirect_table_may_cross_regions_and_lie_at_odd_addresses(rings: Rings, ring: str) -> None:
    memory = rings.memory(1 << 20)
    regions = [region_of(memory, size=1 << 16), region_of(memory, offset=1 << 16, size=1 << 16)]
    driver = make_driver(ring, memory, 8)
    device = rings.device(driver, regions=regions)
    memory.write(memory.gpa + 0x8000, b"payload")
    element = Desc(memory.gpa + 0x8000, 7, 0, 0)
    for table in (memory.gpa + (1 << 16) - 5, memory.gpa + 0x9001):
        memory.write(table, driver._pack(element))
        put_one(driver, Desc(table, 16, INDIRECT, 0))
        (chain,) = device.pop()
        assert chain.data == b"payload"
        device.push((chain, b""))


@pytest.mark.parametrize("ring", FORMATS)
def test_write_flag_beside_an_indirect_table_is_ignored(rings: Rings, ring: str) -> None:
    memory = rings.memory()
    driver = make_driver(ring, memory, 8)
    device = rings.device(driver)
    table = driver.write_table([Desc(memory.allocate(4), 4, 0, 0)])
    put_one(driver, Desc(table, 16, INDIRECT | WRITE, 0))
    (chain,) = device.pop()
    assert (chain.readable, chain.room) == (4, 0)


def test_split_chain_may_end_in_an_indirect_table(rings: Rings) -> None:
    """2.7.5.3.2: zero or more normal chained descriptors followed by a single one with INDIRECT."""
    memory = rings.memory()
    driver = SplitDriver(memory, 8)
    device = rings.device(driver)
    text = memory.allocate(8)
    memory.write(text, b"onetwo..")
    table = driver.write_table([Desc(text + 3, 3, NEXT, 1), Desc(text + 6, 2, WRITE, 0)])
    driver.write_desc(5, Desc(text, 3, NEXT, 2))
    driver.write_desc(2, Desc(table, 32, INDIRECT, 0))
    driver.put_avail(5)
    (chain,) = device.pop()
    assert (chain.data, chain.room, chain.head) == (b"onetwo", 2, 5)


def test_packed_table_entries_are_taken_in_order_whatever_their_next_flag_says(rings: Rings) -> None:
    """2.8.7: WRITE is the only flag that means something in a table."""
    memory = rings.memory()
    driver = PackedDriver(memory, 8)
    device = rings.device(driver)
    text = memory.allocate(8)
    memory.write(text, b"abcdefgh")
    table = driver.write_table([Desc(text, 4, NEXT, 9), Desc(text + 4, 4, 0, 9), Desc(text, 2, WRITE | NEXT, 9)])
    driver.put_descs([Desc(table, 48, INDIRECT, 3)])
    (chain,) = device.pop()
    assert (chain.data, chain.room, chain.head) == (b"abcdefgh", 2, 3)


def test_any_16_bits_will_do_as_a_packed_buffer_id(rings: Rings) -> None:
    memory = rings.memory()
    driver = PackedDriver(memory, 4)
    device = rings.device(driver)
    for buffer_id in (0, 4, 0x7FFF, 0xFFFF):
        driver.put_descs([Desc(memory.gpa, 1, WRITE, buffer_id)])
    chains = device.pop()
    assert [chain.head for chain in chains] == [0, 4, 0x7FFF, 0xFFFF]
    device.push(*((chain, b"z") for chain in chains))
    assert [driver.read_desc(i).link for i in range(4)] == [0, 4, 0x7FFF, 0xFFFF]


@pytest.mark.parametrize("ring", FORMATS)
def test_a_chain_of_single_bytes_is_one_buffer(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 64)
    device = rings.device(driver)
    driver.add([bytes([i]) for i in range(40)], [1] * 24)
    (chain,) = device.pop()
    assert (chain.data, chain.room) == (bytes(range(40)), 24)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("ring", FORMATS)
def test_a_chain_of_1024_descriptors_is_taken_whole(rings: Rings, ring: str, indirect: bool) -> None:
    driver = make_driver(ring, rings.memory(), 2048)
    device = rings.device(driver)
    driver.add_elements([Element(driver.memory.gpa + i, 1, i >= 1000) for i in range(1024)], indirect=indirect)
    (chain,) = device.pop()
    assert (chain.readable, chain.room) == (1000, 24)


@pytest.mark.parametrize("ring", FORMATS)
def test_a_buffer_of_more_than_2_gib_is_counted_right(rings: Rings, ring: str) -> None:
    memory = rings.memory(3 << 30)  # never touched but at its ends
    driver = make_driver(ring, memory, 8)
    device = rings.device(driver)
    length = (2 << 30) + 100
    memory.write(memory.gpa + length - 4, b"last")
    driver.add_elements([Element(memory.gpa, length, False)])
    (chain,) = device.pop()
    assert chain.readable == length
    assert chain.read(length - 4, 10) == b"last"
    assert chain.read(length, 1) == b""


@pytest.mark.parametrize("ring", FORMATS)
def test_used_length_never_exceeds_what_the_driver_gave(rings: Rings, ring: str) -> None:
    """2.7.8.2, whatever the device claims; the driver's side checks it as well."""
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    driver.add([b"x"], [4])
    (chain,) = device.pop()
    assert chain.write(2, b"abcdef") == 2
    device.push((chain, 1000))
    assert [(u.written, u.buffers) for u in driver.used()] == [(4, [b"\0\0ab"])]


@pytest.mark.parametrize("ring", FORMATS)
def test_what_was_checked_is_what_is_used_when_the_driver_changes_its_descriptors_later(
    rings: Rings, ring: str
) -> None:
    """HOSTILE 3: each descriptor is copied once; a chain in hand points where it pointed when it was checked."""
    memory = rings.memory()
    driver = make_driver(ring, memory, 8)
    device = rings.device(driver)
    driver.add([b"honest"], [4])
    driver.add([b"plain", b"er"], [4], indirect=True)
    chains = device.pop()
    for gpa in range(driver.desc, driver.desc + 16 * 8, 16):
        memory.write(gpa, b"\xff" * 16)
    for buffer in driver.in_flight.values():
        for gpa, size in buffer.owned:
            if size == 48:  # the indirect table
                memory.write(gpa, b"\xff" * 48)
    assert [chain.data for chain in chains] == [b"honest", b"plainer"]
    device.push(*((chain, b"ok") for chain in chains))
    assert device.fault == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_chains_in_hand_keep_the_memory_they_began_with(rings: Rings, ring: str) -> None:
    memory = rings.memory()
    driver = make_driver(ring, memory, 8)
    device = rings.device(driver)
    token = driver.add([b"before"], [6])
    (chain,) = device.pop()
    before, device.table = device.table, MemoryTable([region_of(memory)])
    device.vq.set_memory(device.table)
    for region in before.mappings:
        region.fd.close()
    del before
    assert chain.data == b"before"
    device.push((chain, b"after!"))
    assert driver.used() == [(token, 6, [b"after!"])]
    assert device.fault == 0


@pytest.mark.parametrize("how", ["push", "drop"])
@pytest.mark.parametrize("ring", FORMATS)
def test_a_chain_of_a_ring_that_is_gone_goes_back_to_nobody(rings: Rings, ring: str, how: str) -> None:
    """A device that answers after the queue was set up anew, and smaller, must not touch the new ring's books."""
    memory = rings.memory()
    driver = make_driver(ring, memory, 256)
    device = rings.device(driver)
    for _ in range(200):
        driver.add([b"old"], [])
    late = device.pop(200)
    device.driver = fresh = make_driver(ring, memory, 2)
    device.areas, device.size = (fresh.desc, fresh.avail, fresh.used_area), 2
    device.vq.forget()
    (device.drop if how == "drop" else lambda *chains: device.push(*((c, b"") for c in chains)))(*late[:100])
    device.start(fresh.base)
    tokens = [fresh.add([b"new"], [1]) for _ in range(1)]
    (chain,) = device.pop()
    device.push(*((chain, b"") for chain in late[100:]))
    assert fresh.used() == []
    device.push((chain, b"y"))
    assert [used.token for used in fresh.used()] == tokens
    assert device.vq.stats([], True, 0).inflight == 0


@pytest.mark.parametrize("ring", FORMATS)
def test_counters_say_what_went_through(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    driver.add([b"12345"], [10])
    driver.add([b"1"], [])
    chains = device.pop()
    during = device.vq.stats(["request"], True, 1 << 62)
    assert during.inflight == 2
    assert during.oldest_age_seconds > 0
    lib.chain_time(chains[1].pointer, 0, 1)
    device.push((chains[0], b"abc"), (chains[1], b""))
    after = device.vq.stats(["request"], True, 1 << 62)
    assert (after.inflight, after.oldest_age_seconds) == (0, 0.0)
    request = after.ops["request"]
    assert (request.requests, request.errors, request.bytes) == (2, 1, 5 + 3 + 1)
    assert sum(request.duration_buckets) == 2
