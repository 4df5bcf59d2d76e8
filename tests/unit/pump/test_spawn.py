"""Long work: chains taken and served beside the queue, many at once, answered as they are done."""

from __future__ import annotations

import pytest
import trio
from kit.front_end.frontend import NEEDS_RESET, Setting, every_ring, plugged
from kit.ring.driven import Scripted

from virtio.device import Chain, Queue
from virtio.errors import GuestError
from virtio.testing.driver import Used


class Slow:
    """Serves a chain when the test says so: by the text in it."""

    def __init__(self) -> None:
        self.gates: dict[bytes, trio.Event] = {}
        self.begun: list[bytes] = []
        self.cancelled: list[bytes] = []

    async def serve(self, queue: Queue, chain: Chain) -> None:
        text = chain.read()
        self.begun.append(text)
        gate = self.gates.setdefault(text, trio.Event())
        try:
            await gate.wait()
        except trio.Cancelled:
            self.cancelled.append(text)
            raise
        if text == b"guest":
            raise GuestError("what the driver sent")
        if text == b"ours":
            raise RuntimeError("our mistake")
        chain.write(text.upper())

    async def spawn(self, queue: Queue, chain: Chain) -> None:
        queue.spawn(self.serve, chain)


def answer(used: Used) -> bytes:
    return used.buffers[0][: used.written]


def setting_of(ring: str) -> Setting:
    return Setting("waist", ring)


async def begun(slow: Slow, count: int) -> None:
    with trio.fail_after(20):
        while len(slow.begun) < count:
            await trio.testing.wait_all_tasks_blocked(0.001)


@every_ring
async def test_chains_served_beside_each_other_come_back_as_they_are_done(ring: str) -> None:
    device, slow = Scripted(), Slow()
    device.script = slow.spawn
    async with plugged(device, setting_of(ring)) as p:
        queue = p.guest.queues[0]
        tokens = {text: queue.driver.add([text], [8]) for text in (b"one", b"two", b"three")}
        queue.kick()
        await begun(slow, 3)
        for text in (b"three", b"one", b"two"):
            slow.gates[text].set()
            (used,) = await queue.used()
            assert (used.token, answer(used)) == (tokens[text], text.upper())


@every_ring
async def test_a_queue_that_stops_cancels_the_work_and_gives_its_chains_back(ring: str) -> None:
    device, slow = Scripted(), Slow()
    device.script = slow.spawn
    async with plugged(device, setting_of(ring)) as p:
        queue = p.guest.queues[0]
        for text in (b"one", b"two"):
            queue.driver.add([text], [8])
        queue.kick()
        await begun(slow, 2)
        with trio.fail_after(20):
            await p.backend.enable_queue(0, False)
        assert sorted(slow.cancelled) == [b"one", b"two"]
        assert [used.written for used in await queue.used(2)] == [0, 0]
        await p.backend.enable_queue(0, True)
        queue.driver.add([b"three"], [8])
        queue.kick()
        await begun(slow, 3)
        slow.gates[b"three"].set()
        assert answer((await queue.used())[0]) == b"THREE"


@pytest.mark.parametrize("text", [b"guest", b"ours"])
async def test_work_that_fails_breaks_its_queue_and_no_other(text: bytes) -> None:
    device, slow = Scripted(queues=2), Slow()
    device.script = slow.spawn
    async with plugged(device, setting_of("split")) as p:
        bad, good = p.guest.queues
        bad.driver.add([b"waits"], [8])
        bad.driver.add([text], [8])
        bad.kick()
        await begun(slow, 2)
        slow.gates[text].set()
        await bad.broken()
        assert slow.cancelled == [b"waits"]
        good.driver.add([b"fine"], [8])
        good.kick()
        await begun(slow, 3)
        slow.gates[b"fine"].set()
        assert answer((await good.used())[0]) == b"FINE"
        await p.guest.needs_reset()
        assert await p.guest.link.status() & NEEDS_RESET
