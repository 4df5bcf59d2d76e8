"""What a Python device does wrong costs its own queues, is told of once, and harms nobody else."""

from __future__ import annotations

import pytest
import trio
from kit.front_end.frontend import Setting, every_ring, plugged
from kit.ring.driven import Pulling, Scripted
from structlog.testing import capture_logs

from virtio.device import Chain, Queue
from virtio.errors import GuestError
from virtio.testing.queue import GUARD, GuestQueue
from virtio.waist import QueueBroken


def setting(ring: str) -> Setting:
    return Setting("waist", ring)


def add(queue: GuestQueue, text: bytes) -> int:
    return queue.driver.add([text], [8])


async def ask(queue: GuestQueue, text: bytes) -> bytes:
    used = await queue.request([text], [64])
    return used.buffers[0][: used.written]


@every_ring
@pytest.mark.parametrize("moment", ["at once", "after others", "after taking the chain", "after an await"])
async def test_a_device_that_raises_breaks_its_queue_only_and_is_told_of_once(ring: str, moment: str) -> None:
    device = Scripted(queues=2)

    async def fail(queue: Queue, chain: Chain) -> None:
        if queue.index == 1 or (moment == "after others" and len(device.seen) < 3):
            await device.answer(queue, chain)
            return
        if moment == "after taking the chain":
            chain.take()
        if moment == "after an await":
            await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("a mistake in the device")

    device.script = fail
    with capture_logs() as logs:
        async with plugged(device, setting(ring)) as p:
            bad, good = p.guest.queues
            for n in range(6):
                add(bad, f"n{n}".encode())
            bad.kick()
            await bad.broken()
            event = await p.backend.next_event()
            assert isinstance(event, QueueBroken)
            assert event.index == 0
            assert str(event.error) == "queue 0 is broken: its device failed, as the log says"
            assert [used.buffers[0][:2] for used in bad.driver.used()] == [] or moment == "after others"
            for n in range(5):
                bad.ring()  # a broken queue stays broken, quietly
                assert await ask(good, f"good {n}".encode()) == f"GOOD {n}".encode()
            assert [queue.broken for queue in p.backend.stats().queues] == [True, False]
            await p.guest.needs_reset()
            with trio.fail_after(GUARD):
                await p.guest.link.stop(0)  # it can be stopped all the same
            # And after a reset it is as good as new.
            device.script = device.answer
            await p.guest.link.reset()
            p.guest.forget_queues()
            await p.guest.start()
            assert await ask(p.guest.queues[0], b"again") == b"AGAIN"
    failures = [entry for entry in logs if entry["event"] == "device failed"]
    assert len(failures) == 1
    assert failures[0]["exc_info"]
    assert (failures[0]["device"], failures[0]["queue"], failures[0]["log_level"]) == ("scripted", 0, "error")


@every_ring
async def test_a_device_that_pulls_chains_and_raises_can_be_stopped(ring: str) -> None:
    device = Pulling()
    with capture_logs() as logs:
        async with plugged(device, setting(ring)) as p:
            queue = p.guest.queues[0]
            queue.driver.add([], [16])
            queue.kick()
            device.send.send_nowait(b"fail")
            await queue.broken()
            with trio.fail_after(GUARD):
                await p.guest.link.stop(0)
    assert [entry["log_level"] for entry in logs if entry["event"] == "device failed"] == ["error"]


class Collapsing(Scripted):
    """Fails beside its queues, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.collapse = trio.Event()
        self.at_once = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if self.at_once:
            raise ZeroDivisionError("before it began")
        task_status.started()
        await self.collapse.wait()
        raise ZeroDivisionError("beside its queues")


@every_ring
async def test_a_device_that_fails_beside_its_queues_is_out_of_service_and_takes_nobody_along(ring: str) -> None:
    device = Collapsing()
    with capture_logs() as logs:
        async with plugged(device, setting(ring)) as p:
            queue = p.guest.queues[0]
            assert await ask(queue, b"fine") == b"FINE"
            device.collapse.set()
            await queue.broken()
            await p.guest.needs_reset()
            await p.guest.link.reset()
    assert [entry["log_level"] for entry in logs if entry["event"] == "device failed"] == ["error"]


async def test_a_device_that_cannot_begin_is_an_error_of_whoever_begins_it() -> None:
    device = Collapsing()
    device.at_once = True
    with pytest.raises(ExceptionGroup) as caught:
        async with plugged(device, setting("split")):
            raise AssertionError("unreachable")
    assert caught.group_contains(ZeroDivisionError, match="before it began")


@every_ring
async def test_a_guest_error_of_the_device_breaks_the_queue_without_a_traceback(ring: str) -> None:
    device = Scripted()

    async def refuse(queue: Queue, chain: Chain) -> None:
        raise GuestError("a request without a header", head=chain.head, gpa=0x10, length=3)

    device.script = refuse
    with capture_logs() as logs:
        async with plugged(device, setting(ring)) as p:
            queue = p.guest.queues[0]
            add(queue, b"x")
            queue.kick()
            await queue.broken()
            event = await p.backend.next_event()
            assert isinstance(event, QueueBroken)
            assert event.error.gpa == 0x10
            assert event.error.length == 3
    assert not [entry for entry in logs if entry["log_level"] == "error"]
