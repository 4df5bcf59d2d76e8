"""Who is told when: kicks asked for and left out, interrupts sent and left out, against models of the text."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.ring.device import FORMATS, RingDevice, Rings, make_driver, open_rings, read_counter

from virtio.fd import OwnedFd
from virtio.testing.driver import PackedDriver, SplitDriver, VirtqueueDriver

DISABLE, DESC, RESERVED = 1, 2, 3


def use(driver: VirtqueueDriver, device: RingDevice, buffers: int, pieces: int = 1) -> int:
    """Let so many buffers go through in one batch; how many interrupts that gave."""
    for _ in range(buffers):
        driver.add([], [1] * pieces)
    device.push(*((chain, b"x") for chain in device.pop()))
    assert len(driver.used()) == buffers
    return device.interrupts()


# --- interrupts: what the device does with the driver's wish ---


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("ring", FORMATS)
def test_an_interrupt_comes_when_it_is_wanted_and_only_then(rings: Rings, ring: str, event_idx: bool) -> None:
    driver = make_driver(ring, rings.memory(), 8, event_idx=event_idx)
    device = rings.device(driver)
    use(driver, device, 1)  # with EVENT_IDX the very first decision is always to notify
    for wanted in (True, False, True, True, False, False, True):
        assert driver.want_interrupts(wanted) is False
        assert use(driver, device, 2) == wanted
    stats = device.vq.stats([], True, 0)
    assert stats.notifications_sent + stats.notifications_suppressed == 8


@pytest.mark.parametrize("ring", FORMATS)
def test_one_batch_gives_at_most_one_interrupt(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 64)
    device = rings.device(driver)
    assert use(driver, device, 60) == 1


@pytest.mark.parametrize("ring", FORMATS)
def test_an_interrupt_asked_for_late_comes_with_the_entry_it_names(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8, event_idx=True)
    device = rings.device(driver)
    use(driver, device, 1)
    for distance in (1, 2, 5, 8, 3):
        driver.want_interrupt_after(distance)
        assert [use(driver, device, 1) for _ in range(distance)] == [0] * (distance - 1) + [1]


@pytest.mark.parametrize("ring", FORMATS)
def test_wishes_of_the_driver_are_read_as_the_features_say(rings: Rings, ring: str) -> None:
    """2.7.7.2: without EVENT_IDX used_event is ignored, with it the flags are."""
    memory = rings.memory()
    for event_idx in (False, True):
        driver = make_driver(ring, memory, 8, event_idx=event_idx)
        device = rings.device(driver)
        use(driver, device, 1)
        if isinstance(driver, SplitDriver):
            driver.avail_flags = 1
            driver.used_event = 1
            assert use(driver, device, 1) == event_idx
            driver.avail_flags = 0
            driver.used_event = 100
            assert use(driver, device, 1) == (not event_idx)
        else:
            assert isinstance(driver, PackedDriver)
            driver.driver_event = (1, True, DISABLE)
            assert use(driver, device, 1) == 0
            driver.driver_event = (7, True, DESC)
            assert use(driver, device, 1) == (not event_idx)  # DESC means something with EVENT_IDX only


def test_a_reserved_packed_wish_gives_rather_an_interrupt_too_many(rings: Rings) -> None:
    driver = PackedDriver(rings.memory(), 8, event_idx=True)
    device = rings.device(driver)
    driver.driver_event = (0, False, RESERVED)
    assert [use(driver, device, 1) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("ring", FORMATS)
def test_a_new_call_fd_is_signalled_once(rings: Rings, ring: str) -> None:
    device = rings.device(make_driver(ring, rings.memory(), 8))
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    device.vq.set_call(OwnedFd(os.dup(fd)))
    assert read_counter(fd) == 1
    assert device.interrupts() == 0
    os.close(fd)


def expected_interrupts(positions: list[int], event: int, modulus: int) -> bool:
    """The text: a notification is due when the entry at the event's position was used (2.7.7.2, 2.8.10)."""
    return any(position % modulus == event for position in positions)


@settings(deadline=None)
@given(
    start=st.integers(0, 65535),
    batches=st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 8)), min_size=1, max_size=8),
)
def test_split_used_events_are_decided_as_the_text_says(start: int, batches: list[tuple[int, int]]) -> None:
    """2.7.7.2: when the used idx that placed an element was equal to used_event, notify; otherwise do not."""
    with open_rings() as rings:
        driver = SplitDriver(rings.memory(1 << 16), 8, event_idx=True, start=start)
        device = rings.device(driver)
        driver.used_event = start
        assert use(driver, device, 1) == 1
        position = start + 1
        for count, distance in batches:
            driver.used_event = position + distance
            due = expected_interrupts([*range(position, position + count)], (position + distance) % 65536, 65536)
            assert use(driver, device, count) == due
            position += count


@settings(deadline=None)
@given(
    size=st.integers(2, 9),
    start=st.integers(0, 8),
    wrap=st.booleans(),
    batches=st.lists(st.tuples(st.lists(st.integers(1, 3), max_size=4), st.integers(0, 17)), min_size=1, max_size=8),
)
def test_packed_driver_events_are_decided_as_the_text_says(
    size: int, start: int, wrap: bool, batches: list[tuple[list[int], int]]
) -> None:
    """2.8.10: the event triggers when the descriptor at this offset, under this wrap counter, is used. A chain uses up
    all of its descriptors at once."""
    with open_rings() as rings:
        driver = PackedDriver(rings.memory(1 << 16), size, event_idx=True, start=start % size, wrap=wrap)
        device = rings.device(driver)
        # Positions count from slot 0 of a lap with wrap counter 1: the ring's state repeats after 2 * size.
        position = start % size + (0 if wrap else size)
        for shapes, event in batches:
            while sum(shapes) > size:
                shapes.pop()
            event %= 2 * size
            driver.driver_event = (event % size, event < size, DESC)
            tokens = [driver.add([], [1] * pieces) for pieces in shapes]
            device.push(*((chain, b"x") for chain in device.pop()))
            assert [used.token for used in driver.used()] == tokens
            due = expected_interrupts([*range(position, position + sum(shapes))], event, 2 * size)
            assert device.interrupts() == due
            position += sum(shapes)


# --- kicks: what the device asks for, and what the driver makes of it ---


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("ring", FORMATS)
def test_a_sleeping_device_is_kicked_and_a_busy_one_is_not(rings: Rings, ring: str, event_idx: bool) -> None:
    driver = make_driver(ring, rings.memory(), 16, event_idx=event_idx)
    device = rings.device(driver)
    for _ in range(30):
        assert device.vq.arm() is True
        driver.add([b"a"], [])
        assert driver.needs_kick()
        device.vq.disarm()
        device.push(*((chain, b"") for chain in device.pop()))
        driver.add([b"b"], [])
        driver.add([b"c"], [])
        assert not driver.needs_kick()
        device.push(*((chain, b"") for chain in device.pop()))
        assert len(driver.used()) == 3


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("ring", FORMATS)
def test_arming_tells_of_work_that_came_just_before(rings: Rings, ring: str, event_idx: bool) -> None:
    driver = make_driver(ring, rings.memory(), 8, event_idx=event_idx)
    device = rings.device(driver)
    assert device.vq.arm()
    driver.add([b"x"], [])
    assert not device.vq.arm()
    chains = device.pop()
    assert device.vq.arm()
    device.push(*((chain, b"") for chain in chains))
    assert device.vq.arm()


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("ring", FORMATS)
@settings(deadline=None)
@given(steps=st.lists(st.sampled_from(["add", "add", "batch", "serve", "sleep"]), max_size=40), start=st.integers(0, 6))
def test_a_device_that_sleeps_never_misses_a_buffer(ring: str, event_idx: bool, steps: list[str], start: int) -> None:
    """The promise of both suppressions: when the device sleeps (armed, and told that the ring was empty), whatever is
    added next is followed by a kick; it is never asleep beside an available buffer without one."""
    with open_rings() as rings:
        driver = make_driver(
            ring, rings.memory(1 << 16), 7 if ring == "packed" else 8, event_idx=event_idx, start=start
        )
        device = rings.device(driver)
        asleep = False

        def serve() -> None:
            device.push(*((chain, b"") for chain in device.pop()))
            driver.used()

        for step in steps:
            if step == "sleep" and not asleep:
                asleep = device.vq.arm()
                assert asleep == (not driver.in_flight)
            elif step == "serve" and not asleep:
                serve()
            elif step in ("add", "batch"):
                count = min(driver.free_slots, 1 if step == "add" else 3)
                for _ in range(count):
                    driver.add([b"x"], [], publish=False)
                driver.publish()
                if count == 0:
                    continue
                if driver.needs_kick():
                    if asleep:
                        device.vq.disarm()
                        asleep = False
                        serve()
                else:
                    assert not asleep
