"""An IOTLB miss on a Python device's queue parks its ring: what the device has taken, and its tasks, are left alone."""

from __future__ import annotations

import pytest
import trio
from kit.front_end.frontend import every_ring
from kit.ring.driven import Pulling, Scripted, every_driven
from kit.ring.iommu import PAGE, behind_iommu

from virtio.device import Chain, Queue
from virtio.testing.driver import Element
from virtio.testing.queue import GUARD, GuestQueue


class Watched(Scripted):
    """Counts what it is told, and serves each chain in a task of its own when the test opens the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.script = self.spawn
        self.gate = trio.Event()
        self.begun: list[bytes] = []
        self.cancelled = 0
        self.told: list[bool] = []
        self.stops = 0
        self.runs = 0

    async def run_queue(self, queue: Queue) -> None:
        self.runs += 1
        await super().run_queue(queue)

    async def spawn(self, queue: Queue, chain: Chain) -> None:
        queue.spawn(self.serve, chain)

    async def serve(self, queue: Queue, chain: Chain) -> None:
        text = chain.read()
        self.begun.append(text)
        try:
            await self.gate.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        chain.write(text.upper())

    def queue_running(self, queue_index: int, running: bool) -> None:
        self.told.append(running)

    async def queue_stopping(self, queue: Queue) -> None:
        self.stops += 1


async def begin_the_first(queue: GuestQueue, device: Watched) -> None:
    queue.driver.add([b"first"], [8])
    queue.kick()
    with trio.fail_after(GUARD):
        while device.begun != [b"first"]:
            await trio.lowlevel.checkpoint()


def ask_on_a_fresh_page(queue: GuestQueue) -> None:
    """A request whose text lies where no translation leads yet; the room for its answer has one."""
    memory = queue.driver.memory
    page = memory.allocate(PAGE, PAGE)
    memory.write(page, b"fresh")
    queue.driver.add_elements([Element(page, 5, False), Element(page + 64, 8, True)])


@every_ring
async def test_a_miss_cancels_no_spawned_work_and_loses_no_answer(ring: str) -> None:
    device = Watched()
    async with behind_iommu("pump", ring, device=device) as (p, iommu):
        queue = p.guest.queues[0]
        await begin_the_first(queue, device)
        before = (device.runs, device.stops, list(device.told))
        ask_on_a_fresh_page(queue)
        queue.kick()
        with trio.fail_after(GUARD):
            while device.begun != [b"first", b"fresh"]:
                await trio.lowlevel.checkpoint()
        device.gate.set()
        answers = [used.buffers[0][: used.written] for used in await queue.used(2)]
        assert sorted(answers) == [b"FIRST", b"FRESH"]
        assert device.cancelled == 0
        assert (device.runs, device.stops, device.told) == before
        assert iommu.broken == []


@every_ring
async def test_a_taken_chain_is_answered_while_the_ring_is_parked(ring: str) -> None:
    device = Watched()
    async with behind_iommu("pump", ring, device=device) as (p, iommu):
        queue = p.guest.queues[0]
        await begin_the_first(queue, device)
        iommu.gate = trio.Event()
        asked = len(iommu.asked)
        ask_on_a_fresh_page(queue)
        queue.kick()
        await iommu.asked_for(asked + 1)
        device.gate.set()
        (used,) = await queue.used()
        assert used.buffers[0][: used.written] == b"FIRST"
        iommu.gate.set()
        (used,) = await queue.used()
        assert used.buffers[0][: used.written] == b"FRESH"


@every_ring
async def test_a_device_that_pulls_is_given_the_chain_that_missed(ring: str) -> None:
    device = Pulling()
    async with behind_iommu("pump", ring, device=device) as (p, _):
        queue = p.guest.queues[0]
        for text in (b"one", b"two", b"three"):
            ask_on_a_fresh_page(queue)
            queue.kick()
            await device.send.send(text)
            (used,) = await queue.used()
            assert used.buffers[0][: used.written] == text


@every_driven
@every_ring
@pytest.mark.parametrize("stop", ["stop", "reset"])
async def test_an_answer_that_comes_while_the_queue_stops_is_no_mistake(driven: str, ring: str, stop: str) -> None:
    async with behind_iommu(driven, ring) as (p, iommu):
        queue = p.guest.queues[0]
        iommu.gate = trio.Event()
        asked = len(iommu.asked)
        ask_on_a_fresh_page(queue)
        queue.kick()
        await iommu.asked_for(asked + 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.guest.link.stop, 0) if stop == "stop" else nursery.start_soon(p.guest.link.reset)
            iommu.gate.set()
            for _ in range(20):
                await iommu.map_all()
                await trio.lowlevel.checkpoint()
