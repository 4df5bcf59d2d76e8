"""What a guest may ask of a Python device at once: a longer chain breaks the queue before the device sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

import pytest
from kit.front_end.frontend import Setting, every_ring, plugged
from kit.ring.device import Rings, make_driver
from kit.ring.driven import Scripted

from virtio.device import Chain, Device, DeviceOptions, Queue
from virtio.devices.rng import Rng
from virtio.spec import CHAIN_LENGTH_MAX
from virtio.testing import attach
from virtio.testing.queue import GuestQueue
from virtio.testing.virtqueue_driver import Element
from virtio.waist import QueueBroken

MOST = 1 << 20


def long_chain(queue: GuestQueue, readable: int, writable: int) -> int:
    """A chain of so many bytes in an indirect table whose entries are all the same 64 KiB."""
    room = queue.driver.memory.allocate(1 << 16)
    elements = [
        Element(room, min(left, 1 << 16), is_writable)
        for length, is_writable in ((readable, False), (writable, True))
        for left in range(length, 0, -(1 << 16))
    ]
    return queue.driver.add_elements(elements, indirect=True)


class Puller(Scripted):
    """Takes its chains from the queue itself, one way or the other."""

    request_max = 100

    def __init__(self, take: Callable[[Queue], Awaitable[Chain]]) -> None:
        super().__init__(queues=2)
        self.take = take

    async def run_queue(self, queue: Queue) -> None:
        while True:
            chain = await self.take(queue)
            self.seen.append(chain.read())
            chain.write(b"yes")
            chain.complete()


async def at_hand(queue: Queue) -> Chain:
    while (chain := queue.chain_at_hand()) is None:
        queue.put_back(await queue.next_chain())
    return chain


@every_ring
@pytest.mark.parametrize(("readable", "writable"), [(MOST + 1, 8), (8, MOST + 1)])
async def test_a_chain_of_more_than_a_mib_either_way_breaks_its_queue_unless_the_device_says_otherwise(
    ring: str, readable: int, writable: int
) -> None:
    device = Scripted(queues=2)
    async with plugged(device, Setting("waist", ring)) as p:
        bad, good = p.guest.queues
        long_chain(bad, MOST, MOST)
        bad.kick()
        (used,) = await bad.used()
        assert used.written == MOST
        assert [len(data) for data in device.seen] == [MOST]
        head = long_chain(bad, readable, writable)
        bad.kick()
        await bad.broken()
        assert len(device.seen) == 1, "the device was given it"
        assert bad.driver.used() == []
        event = await p.backend.next_event()
        assert isinstance(event, QueueBroken)
        assert "a request of more bytes than its device takes (request_max): head " in str(event.error)
        assert f" has {readable} bytes to read and room for {writable}" in str(event.error)
        assert head >= 0
        assert p.backend.stats().queues[0].inflight == 0
        assert [queue.broken for queue in p.backend.stats().queues] == [True, False]
        assert (await good.request([b"still there"], [64])).buffers[0][:11] == b"STILL THERE"


@every_ring
@pytest.mark.parametrize("take", [Queue.next_chain, at_hand])
async def test_a_device_that_pulls_its_chains_is_never_given_a_longer_one(
    ring: str, take: Callable[[Queue], Awaitable[Chain]]
) -> None:
    device = Puller(take)
    async with plugged(device, Setting("waist", ring)) as p:
        queue = p.guest.queues[0]
        queue.driver.add([bytes(100)], [100])
        queue.kick()
        await queue.used()
        queue.driver.add([bytes(100)], [101])
        queue.kick()
        await queue.broken()
        assert device.seen == [bytes(100)]


@every_ring
async def test_those_before_a_chain_that_is_too_long_were_served(ring: str) -> None:
    device = Scripted()
    async with plugged(device, Setting("waist", ring)) as p:
        queue = p.guest.queues[0]
        for text in (b"one", b"two"):
            queue.driver.add([text], [8])
        long_chain(queue, MOST + 1, 8)
        queue.driver.add([b"three"], [8])
        queue.kick()
        await queue.broken()
        assert device.seen == [b"one", b"two"]


@every_ring
async def test_a_queue_that_broke_so_serves_again_after_a_reset(ring: str) -> None:
    device = Scripted()
    async with attach(device, ring=ring, memory_size=16 << 20) as driver:  # type: ignore[arg-type]
        driver.post(0, bytes(MOST + 1), writable=8)
        await driver.broken(0)
        await driver.reset()
        assert await driver.request(0, b"anew", writable=8) == b"ANEW"


@every_ring
async def test_a_device_that_bounds_its_answers_may_take_a_chain_of_any_length(ring: str) -> None:
    assert Rng.request_max == CHAIN_LENGTH_MAX
    async with plugged(Rng("rng", DeviceOptions(), 1, 64), Setting("waist", ring)) as p:
        queue = p.guest.queues[0]
        long_chain(queue, 0, 32 << 20)
        queue.kick()
        (used,) = await queue.used()
        assert used.written == 64 * 1024


@every_ring
def test_chains_are_popped_by_the_mib(rings: Rings, ring: str) -> None:
    memory = rings.memory(4 << 20)
    driver = make_driver(ring, memory, 64)
    device = rings.device(driver)
    room = memory.allocate(1 << 18)
    for _ in range(10):
        driver.add_elements([Element(room, 1 << 18, False), Element(room, 1, True)])
    popped = []
    while chains := device.pop():
        popped.append(len(chains))
        device.push(*((chain, 0) for chain in chains))
    assert popped == [4, 4, 2]


class Small(Device):
    """Says how much it takes."""

    virtio_id: ClassVar[int] = 42
    type_name = "small"
    request_max = 16

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(chain.read())


@every_ring
async def test_a_device_says_how_much_it_takes(ring: str) -> None:
    async with attach(Small("small", DeviceOptions(), 1, 64), ring=ring) as driver:  # type: ignore[arg-type]
        assert await driver.request(0, bytes(16), writable=16) == bytes(16)
        driver.post(0, bytes(17), writable=16)
        await driver.broken(0)
