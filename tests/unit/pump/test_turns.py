"""A Python device's queue has the event loop for a limited time, however much its driver asks for."""

from __future__ import annotations

import pytest
import trio
from kit.front_end.frontend import Setting, every_ring, plugged
from kit.ring.driven import Pulling, Scripted

from virtio.native import pump
from virtio.native.chain import Chain
from virtio.native.pump import TURN_NS, Queue
from virtio.testing.queue import GUARD

COST_NS = 100_000
EACH_TURN = TURN_NS // COST_NS


class Clock:
    """Time passes when a device says so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pump, "now_ns", clock)
    monkeypatch.setattr(pump, "TURN_NS", TURN_NS)
    return clock


class Others:
    """Another task of the daemon: how often it had its turn."""

    def __init__(self) -> None:
        self.turns = 0

    async def run(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.turns += 1


def longest_run(turns_seen: list[int]) -> int:
    """Of chains that were handled while the others had no turn."""
    return max(turns_seen.count(turn) for turn in set(turns_seen))


@every_ring
async def test_a_turn_ends_by_time_and_not_by_chains(ring: str, clock: Clock) -> None:
    device, others, seen = Scripted(), Others(), []

    async def slow(queue: Queue, chain: Chain) -> None:
        clock.now += COST_NS
        seen.append(others.turns)

    device.script = slow
    async with plugged(device, Setting("waist", ring), queue_size=256) as p, trio.open_nursery() as nursery:
        queue = p.guest.queues[0]
        nursery.start_soon(others.run)
        for _ in range(64):
            queue.driver.add([b"x"], [])
        queue.kick()
        await queue.used(64)
        nursery.cancel_scope.cancel()
    assert len(seen) == 64
    # trio runs the tasks of one pass in any order, so the others may be last in one and first in the next.
    assert longest_run(seen) <= 2 * EACH_TURN


@every_ring
async def test_a_turn_of_quick_requests_is_a_whole_batch(ring: str, clock: Clock) -> None:
    device = Scripted()
    async with plugged(device, Setting("waist", ring), queue_size=256) as p:
        queue = p.guest.queues[0]
        before = p.backend.stats().queues[0]
        for _ in range(64):
            queue.driver.add([b"x"], [8])
        queue.kick()
        await queue.used(64)
        after = p.backend.stats().queues[0]
        assert after.notifications_sent - before.notifications_sent == 1


@every_ring
async def test_what_a_turn_has_done_goes_back_to_the_driver_at_its_end(ring: str, clock: Clock) -> None:
    device, held = Scripted(), trio.Event()

    async def slow(queue: Queue, chain: Chain) -> None:
        if len(device.seen) == EACH_TURN:
            await held.wait()
        clock.now += COST_NS
        await device.answer(queue, chain)

    device.script = slow
    async with plugged(device, Setting("waist", ring), queue_size=256) as p:
        queue = p.guest.queues[0]
        for _ in range(20):
            queue.driver.add([b"x"], [8])
        queue.kick()
        assert len(await queue.used(EACH_TURN)) == EACH_TURN
        held.set()
        await queue.used(20 - EACH_TURN)


@every_ring
async def test_a_stop_between_two_turns_loses_and_repeats_nothing(ring: str, clock: Clock) -> None:
    device = Scripted()

    async def slow(queue: Queue, chain: Chain) -> None:
        clock.now += TURN_NS
        await device.answer(queue, chain)

    device.script = slow
    async with plugged(device, Setting("waist", ring), queue_size=256) as p:
        queue, texts = p.guest.queues[0], [f"n{n}".encode() for n in range(40)]
        for text in texts:
            queue.driver.add([text], [8])
        queue.kick()
        while len(device.seen) < len(texts):
            base = await p.backend.suspend_queue(0)
            await p.guest.link.set_up(0, queue.driver.size, queue.areas, base)
            await trio.lowlevel.checkpoint()
        await queue.used(len(texts))
        assert device.seen == texts


async def test_a_device_that_pulls_chain_after_chain_lets_the_others_run(clock: Clock) -> None:
    others, seen = Others(), []

    class Greedy(Pulling):
        async def run_queue(self, queue: Queue) -> None:
            while True:
                chain = await queue.next_chain()
                clock.now += COST_NS
                seen.append(others.turns)
                chain.complete()

    async with plugged(Greedy(), Setting("waist", "split"), queue_size=64) as p, trio.open_nursery() as nursery:
        queue = p.guest.queues[0]
        nursery.start_soon(others.run)
        for _ in range(60):
            queue.driver.add([], [8])
        queue.kick()
        with trio.fail_after(GUARD):
            await queue.used(60)
        nursery.cancel_scope.cancel()
    assert longest_run(seen) <= 2 * EACH_TURN
