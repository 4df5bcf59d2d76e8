"""A device that keeps chains, because it failed or because it forgot, holds up neither a stop nor a reset for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import trio
from kit.front_end.frontend import Setting, every_ring, plugged
from kit.ring.driven import Scripted
from structlog.testing import capture_logs

from virtio.backend import drivers as running
from virtio.device import Chain, Device, DeviceOptions, Queue
from virtio.errors import GuestError
from virtio.testing.queue import GUARD, GuestQueue

TEXTS = (b"one", b"two", b"three")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices have almost no time."""
    monkeypatch.setattr(running, "KEPT_SECONDS", 0.02)


def post_all(queue: GuestQueue) -> list[int]:
    tokens = [queue.driver.add([text], [8]) for text in TEXTS]
    queue.kick()
    return tokens


class Hoarding(Device):
    """Pulls three chains, and fails."""

    virtio_id: ClassVar[int] = 42
    type_name = "hoarding"

    def __init__(self, error: type[Exception]) -> None:
        super().__init__("hoarding", DeviceOptions(), 1, 64)
        self.error = error
        self.held: list[Chain] = []

    async def run_queue(self, queue: Queue) -> None:
        for _ in TEXTS:
            self.held.append(await queue.next_chain())
        raise self.error("oops")


@every_ring
@pytest.mark.parametrize("error", [ValueError, GuestError])
async def test_a_device_that_fails_with_several_chains_in_its_hands_can_be_stopped_and_reset(
    ring: str, error: type[Exception]
) -> None:
    device = Hoarding(error)
    async with plugged(device, Setting("waist", ring)) as p:
        for end in (lambda: p.guest.link.stop(0), p.guest.link.reset):
            post_all(p.guest.queues[0])
            await p.guest.queues[0].broken()
            assert p.backend.stats().queues[0].inflight == 0  # at once: nobody waits for a device that has failed
            with trio.fail_after(GUARD):
                await end()
                await p.guest.link.reset()
            p.guest.forget_queues()
            await p.guest.start()
    for chain in device.held:
        assert chain.returned
        chain.complete()  # too late, and no harm


@every_ring
@pytest.mark.usefixtures("short")
async def test_chains_that_a_device_forgets_go_back_empty_when_their_queue_stops(ring: str) -> None:
    device = Scripted()

    async def forget(queue: Queue, chain: Chain) -> None:
        chain.write(b"half")
        device.taken.append(chain.take())

    device.script = forget
    with capture_logs() as logs:
        async with plugged(device, Setting("waist", ring)) as p:
            queue = p.guest.queues[0]
            tokens = post_all(queue)
            with trio.fail_after(GUARD):
                while len(device.taken) < len(TEXTS):
                    await trio.lowlevel.checkpoint()
                base = await p.guest.link.stop(0)
            used = queue.driver.used()
            assert [(each.token, each.written) for each in used] == [(token, 0) for token in tokens]
            # The queue goes on where it was, and what comes too late goes nowhere.
            device.script = device.answer
            await p.guest.start_queue(0, base)
            for chain in device.taken:
                assert chain.write(b"late") == 0
                chain.complete()
                with pytest.raises(ValueError, match="went back"):
                    chain.read()
            answer = await queue.request([b"and on"], [8])
            assert answer.buffers[0][: answer.written] == b"AND ON"
            stats = p.backend.stats().queues[0]
            assert (stats.inflight, stats.ops["request"].requests, stats.ops["request"].errors) == (0, 4, 3)
    (complaint,) = [entry for entry in logs if entry["event"] == "device failed"]
    assert (complaint["device"], complaint["queue"]) == ("scripted", 0)
    assert "has not given back 3 chains" in complaint["error"]


class Slow(Scripted):
    """Its chains are answered beside its queues, whenever ``go`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.script = self.keep
        self.go = trio.Event()
        self.stops = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await self.go.wait()
        for chain in self.taken:
            chain.write(b"done")
            chain.complete()

    async def queue_stopping(self, queue: Queue) -> None:
        self.stops.set()


@every_ring
async def test_a_device_that_takes_its_time_is_waited_for(ring: str) -> None:
    device = Slow()
    with capture_logs() as logs:
        async with plugged(device, Setting("waist", ring)) as p, trio.open_nursery() as nursery:
            queue = p.guest.queues[0]
            post_all(queue)
            with trio.fail_after(GUARD):
                while len(device.taken) < len(TEXTS):
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(p.guest.link.stop, 0)
                await device.stops.wait()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert not any(chain.returned for chain in device.taken)
            device.go.set()
            await trio.testing.wait_all_tasks_blocked()
            assert [used.buffers[0][: used.written] for used in queue.driver.used()] == [b"done"] * 3
    assert not [entry for entry in logs if entry["event"] == "device failed"]


@every_ring
@pytest.mark.usefixtures("short")
async def test_a_device_whose_queue_never_finishes_stopping_is_stopped(ring: str) -> None:
    class Endless(Scripted):
        async def queue_stopping(self, queue: Queue) -> None:
            async with trio.open_nursery():
                await trio.sleep_forever()

    with capture_logs() as logs:
        async with plugged(Endless(), Setting("waist", ring)) as p:
            with trio.fail_after(GUARD):
                await p.guest.link.stop(0)
    (complaint,) = [entry for entry in logs if entry["event"] == "device failed"]
    assert "queue_stopping() has not returned" in complaint["error"]


@every_ring
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("way", ["put back", "pushed"])
async def test_a_chain_that_was_withdrawn_is_neither_put_back_nor_pushed(ring: str, way: str) -> None:
    device = Scripted()
    queues: list[Queue] = []

    async def keep(queue: Queue, chain: Chain) -> None:
        queues.append(queue)
        device.taken.append(chain.take())

    device.script = keep
    async with plugged(device, Setting("waist", ring)) as p:
        queue = p.guest.queues[0]
        queue.driver.add([b"x"], [8])
        queue.kick()
        with trio.fail_after(GUARD):
            while not device.taken:
                await trio.lowlevel.checkpoint()
            base = await p.guest.link.stop(0)
        late: Callable[[], None] = {
            "put back": lambda: queues[0].put_back(device.taken[0]),
            "pushed": lambda: queues[0].push(device.taken),
        }[way]
        late()
        assert len(queue.driver.used()) == 1
        device.script = device.answer
        await p.guest.start_queue(0, base)
        late()
        assert (await queue.request([b"on"], [8])).written == 2
        assert device.seen == [b"on"]
