"""How a Python device is driven: chains in order or out of it, batches, stops in the middle, and its mistakes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import trio
import trio.testing
from kit.front_end.frontend import Plugged, Setting, every_ring, plugged
from kit.ring.driven import Pulling, Scripted

from virtio.native.chain import Chain
from virtio.native.pump import BATCH, Queue
from virtio.testing.queue import GUARD, GuestQueue


def setting(ring: str) -> Setting:
    return Setting("waist", ring)


def add(queue: GuestQueue, text: bytes) -> int:
    return queue.driver.add([text], [8])


async def ask(queue: GuestQueue, text: bytes) -> bytes:
    used = await queue.request([text], [64])
    return used.buffers[0][: used.written]


# --- order ---


@every_ring
async def test_chains_are_handled_in_order_and_answered_in_order(ring: str) -> None:
    device = Scripted()
    async with plugged(device, setting(ring), queue_size=256) as p:
        queue = p.guest.queues[0]
        texts = [f"n{n}".encode() for n in range(100)]  # more than a batch
        tokens = [add(queue, text) for text in texts]
        queue.kick()
        back = await queue.used(100)
        assert device.seen == texts
        assert [used.token for used in back] == tokens
        assert [used.buffers[0][: used.written] for used in back] == [text.upper() for text in texts]


@every_ring
async def test_chains_that_were_taken_are_completed_in_any_order(ring: str) -> None:
    device = Scripted()
    device.script = device.keep
    async with plugged(device, setting(ring)) as p:
        queue = p.guest.queues[0]
        tokens = [add(queue, f"n{n}".encode()) for n in range(10)]
        queue.kick()
        await trio.testing.wait_all_tasks_blocked()
        assert p.backend.stats().queues[0].inflight == 10
        assert p.backend.stats().queues[0].oldest_age_seconds > 0
        order = [7, 0, 9, 3, 1, 2, 8, 4, 6, 5]
        for n in order:
            device.taken[n].write(str(n).encode())
            device.taken[n].complete()
        back = await queue.used(10)
        assert [used.token for used in back] == [tokens[n] for n in order]
        assert [used.buffers[0][:1] for used in back] == [str(n).encode() for n in order]
        stats = p.backend.stats().queues[0]
        assert (stats.inflight, stats.oldest_age_seconds) == (0, 0.0)


@every_ring
async def test_those_that_were_taken_do_not_hold_up_those_behind_them(ring: str) -> None:
    device = Scripted()

    async def keep_some(queue: Queue, chain: Chain) -> None:
        await (device.keep if len(device.seen) % 3 == 0 and not device.taken else device.answer)(queue, chain)

    device.script = keep_some
    async with plugged(device, setting(ring)) as p:
        queue = p.guest.queues[0]
        first = add(queue, b"wait")
        queue.kick()
        for n in range(20):
            assert await ask(queue, f"n{n}".encode()) == f"N{n}".encode()
        device.taken[0].write(b"late")
        device.taken[0].complete()
        (used,) = await queue.used()
        assert (used.token, used.written) == (first, 4)


@every_ring
async def test_a_batch_is_answered_with_one_notification(ring: str) -> None:
    async with plugged(Scripted(), setting(ring), queue_size=256) as p:
        queue = p.guest.queues[0]
        await trio.testing.wait_all_tasks_blocked()  # it waits for a kick by now
        before = p.backend.stats().queues[0]
        for n in range(BATCH):
            add(queue, bytes([n]))
        queue.kick()
        await queue.used(BATCH)
        after = p.backend.stats().queues[0]
        assert after.ops["request"].requests == BATCH
        assert after.notifications_sent - before.notifications_sent == 1
        assert after.kicks - before.kicks == 1


async def test_other_tasks_have_their_turn_between_batches() -> None:
    device = Scripted()
    turns: list[int] = []
    async with plugged(device, setting("split"), queue_size=256) as p:
        queue = p.guest.queues[0]

        async def beside() -> None:
            while len(device.seen) < 200:
                turns.append(len(device.seen))
                await trio.lowlevel.checkpoint()

        for n in range(200):
            queue.driver.add([bytes([n])], [])
        queue.kick()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside)
            await queue.used(200)
    # Within one round of trio's tasks the order is random: two batches may meet.
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) <= 2 * BATCH


# --- stops ---


@every_ring
@pytest.mark.parametrize("handled", [0, 1, 5])
async def test_what_was_not_handled_when_the_queue_stops_is_found_again(ring: str, handled: int) -> None:
    device = Scripted()

    async def up_to(queue: Queue, chain: Chain) -> None:
        if len(device.seen) == handled:
            await trio.sleep_forever()
        await device.answer(queue, chain)

    device.script = up_to
    async with plugged(device, setting(ring), queue_size=16) as p:
        queue, link = p.guest.queues[0], p.guest.link
        for start in range(3):  # over the ring's end too
            device.seen.clear()
            device.script = up_to
            texts = [f"{start}{n}".encode() for n in range(8)]
            for text in texts:
                add(queue, text)
            queue.kick()
            await trio.testing.wait_all_tasks_blocked()
            base = await link.stop(0)
            done = queue.driver.used()
            assert [used.buffers[0][: used.written] for used in done] == texts[:handled]
            assert p.backend.stats().queues[0].inflight == 0
            device.script = device.answer
            await p.guest.start_queue(0, base)
            rest = await queue.used(8 - handled)
            assert [used.buffers[0][: used.written] for used in rest] == texts[handled:]
            assert device.seen == texts
            assert await link.stop(0) == queue.driver.base
            await p.guest.start_queue(0, queue.driver.base)


@every_ring
async def test_a_stop_waits_for_chains_that_were_taken(ring: str) -> None:
    device = Scripted()
    device.script = device.keep
    async with plugged(device, setting(ring)) as p:
        queue = p.guest.queues[0]
        add(queue, b"one")
        add(queue, b"two")
        queue.kick()
        await trio.testing.wait_all_tasks_blocked()
        bases: list[int] = []

        async def stop() -> None:
            bases.append(await p.guest.link.stop(0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            await trio.testing.wait_all_tasks_blocked()
            device.taken[1].complete()
            await trio.testing.wait_all_tasks_blocked()
            assert bases == []
            device.taken[0].complete()
        assert len(queue.driver.used()) == 2
        assert bases == [queue.driver.base]


@every_ring
async def test_a_device_is_asked_to_give_back_what_it_took_when_the_queue_stops(ring: str) -> None:
    device = Scripted()
    device.script = device.keep

    def give_back() -> None:
        for chain in device.taken:
            if not chain.returned:
                chain.complete()

    device.stopping = give_back
    async with plugged(device, setting(ring)) as p:
        queue = p.guest.queues[0]
        for n in range(5):
            add(queue, bytes([n]))
        queue.kick()
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(GUARD):
            assert await p.guest.link.stop(0) == queue.driver.base
        assert [used.written for used in queue.driver.used()] == [0] * 5


@every_ring
async def test_a_device_may_pull_chains_when_it_needs_them(ring: str) -> None:
    device = Pulling()
    async with plugged(device, setting(ring)) as p:
        queue = p.guest.queues[0]
        queue.driver.add([], [16])
        queue.driver.add([], [16])
        queue.kick()
        device.send.send_nowait(b"hello")
        (used,) = await queue.used()
        assert used.buffers[0][: used.written] == b"hello"
        with trio.fail_after(GUARD):
            base = await p.guest.link.stop(0)
        assert [used.written for used in queue.driver.used()] == [0]
        assert base == queue.driver.base


# --- a chain ---


async def check_chain(check: Callable[[Chain], None], readable: list[bytes], writable: list[int]) -> Plugged:
    """Run ``check`` on a chain of these pieces, in a device's handler."""
    device = Scripted()
    failures: list[BaseException] = []

    async def run_check(queue: Queue, chain: Chain) -> None:
        try:
            check(chain)
        except BaseException as error:
            failures.append(error)

    device.script = run_check
    async with plugged(device, setting("split")) as p:
        await p.guest.queues[0].request(readable, writable)
    if failures:
        raise failures[0]
    return p


async def test_a_chain_is_read_and_written_piece_by_piece() -> None:
    def check(chain: Chain) -> None:
        assert (chain.readable_length, chain.writable_length) == (11, 9)
        assert chain.read(0) == b""
        assert chain.read(3) == b"hel"
        assert chain.read(4) == b"lo w"
        assert chain.read() == b"orld"
        assert chain.read() == b""
        assert chain.read(5) == b""
        assert chain.write(b"") == 0
        assert chain.write(b"abc") == 3
        assert chain.write(bytearray(b"de")) == 2
        assert chain.write(memoryview(b"fghijkl")) == 4  # what fits
        assert chain.write(b"m") == 0
        assert chain.written == 9

    await check_chain(check, [b"he", b"llo worl", b"d"], [1, 5, 3])


async def test_a_chain_that_went_back_is_not_touched_any_more() -> None:
    device = Scripted()
    device.script = device.keep
    async with plugged(device, setting("split")) as p:
        queue = p.guest.queues[0]
        add(queue, b"once")
        queue.kick()
        await trio.testing.wait_all_tasks_blocked()
        (chain,) = device.taken
        assert chain.read() == b"once"
        chain.complete()
        assert chain.returned
        for use in (chain.complete, chain.take, chain.read, lambda: chain.write(b"x")):
            with pytest.raises(ValueError, match="went back to the driver already"):
                use()
        assert len(await queue.used()) == 1


async def test_only_a_chain_that_was_taken_is_completed_by_hand() -> None:
    def check(chain: Chain) -> None:
        with pytest.raises(ValueError, match="only a chain that was taken"):
            chain.complete()

    await check_chain(check, [b"x"], [])


@every_ring
async def test_the_guest_waits_for_a_batch_and_for_those_before_it(ring: str) -> None:
    """What comes with the second batch has waited for all of the first, which no request's own time says."""
    device = Scripted()
    slow_ns = 200_000

    async def slowly(queue: Queue, chain: Chain) -> None:
        until = time.monotonic_ns() + slow_ns
        while time.monotonic_ns() < until:
            pass
        await device.answer(queue, chain)

    device.script = slowly
    async with plugged(device, setting(ring), queue_size=256) as p:
        queue = p.guest.queues[0]
        before = time.monotonic()
        for n in range(BATCH + 10):
            add(queue, bytes([n]))
        queue.kick()
        await queue.used(BATCH + 10)
        stats = p.backend.stats().queues[0]
        assert sum(stats.guest_duration_buckets) == BATCH + 10
        own = stats.ops["request"].duration_sum_seconds
        assert stats.guest_duration_sum_seconds - own >= 10 * BATCH * slow_ns / 1e9
        assert stats.guest_duration_sum_seconds <= (BATCH + 10) * (time.monotonic() - before)


@every_ring
async def test_a_buffer_that_waits_to_be_filled_is_no_request_that_waits(ring: str) -> None:
    device = Pulling()
    async with plugged(device, setting(ring)) as p:
        queue = p.guest.queues[0]
        queue.driver.add([], [16])
        queue.kick()
        device.send.send_nowait(b"hello")
        await queue.used()
        stats = p.backend.stats().queues[0]
        assert stats.ops["request"].requests == 1
        assert not any(stats.guest_duration_buckets)


@every_ring
async def test_operations_and_failures_are_counted_as_the_device_says(ring: str) -> None:
    device = Scripted()

    async def special(queue: Queue, chain: Chain) -> None:
        chain.op = 1 if chain.read() == b"special" else 0
        chain.failed = chain.op == 1

    device.script = special
    async with plugged(device, setting(ring)) as p:
        queue = p.guest.queues[0]
        for text in (b"plain", b"special", b"plain"):
            await queue.request([text], [8])
        ops = p.backend.stats().queues[0].ops
        assert (ops["request"].requests, ops["request"].errors) == (2, 0)
        assert (ops["special"].requests, ops["special"].errors) == (1, 1)
        assert ops["request"].bytes == 10
        assert sum(ops["request"].duration_buckets) == 2
        assert ops["request"].duration_sum_seconds > 0
