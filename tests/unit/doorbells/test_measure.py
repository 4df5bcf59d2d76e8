"""A queue with several doorbells: whichever rings, the queue is served, and each is counted by its kind."""

from __future__ import annotations

import contextlib
import os

import pytest
import trio
from kit.front_end.frontend import Plugged, Setting, every_ring, plugged
from kit.front_end.vhost_user_wire import eventfd, no_fd_leaks
from kit.ring.driven import add_request, check_it_works, every_driven, make_device

from virtio.errors import PeerError
from virtio.fd import OwnedFd, eventfd_id
from virtio.native.interrupt import InterruptStatus
from virtio.waist import Doorbell

FURTHER = (Doorbell.PIO, Doorbell.HYPERCALL)


def setting_of(driven: str, ring: str = "split") -> Setting:
    return Setting("waist", ring, "" if driven == "pump" else driven)


def given(fd: int) -> OwnedFd:
    return OwnedFd(os.dup(fd))


async def ring_and_wait(p: Plugged, fd: int) -> None:
    """One request, rung by ``fd`` whether the device wants a kick or not, and its answer."""
    queue = p.guest.queues[0]
    add_request(queue)
    os.eventfd_write(fd, 1)
    assert len(await queue.used()) == 1


def counted(p: Plugged) -> dict[str, int]:
    return dict(p.backend.stats().queues[0].doorbells)


@every_driven
@every_ring
async def test_every_kind_of_doorbell_rings_the_queue_and_is_counted_by_kind(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring)) as p:
        fds = {kind: eventfd() for kind in FURTHER}
        for kind, fd in fds.items():
            await p.backend.set_doorbell(0, kind, given(fd))
        before = counted(p)
        for times, fd in enumerate(fds.values(), start=1):
            for _ in range(times):
                await ring_and_wait(p, fd)
        await check_it_works(p.guest.queues[0])
        with trio.fail_after(20):  # a worker that polls sees the ring first, and the eventfds when it next sleeps
            while (after := counted(p))["pio"] < 1 or after["hypercall"] < 2:
                p.guest.queues[0].ring()
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert (after["pio"], after["hypercall"]) == (1, 2)
        assert before["pio"] == before["hypercall"] == 0
        assert p.backend.stats().queues[0].kicks == sum(after.values())
        for fd in fds.values():
            os.close(fd)


@every_driven
@every_ring
async def test_a_withdrawn_doorbell_is_looked_at_no_more_and_the_plain_one_goes_on(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring)) as p:
        with no_fd_leaks():
            fd = eventfd()
            for _ in range(3):
                await p.backend.set_doorbell(0, Doorbell.HYPERCALL, given(fd))
                await ring_and_wait(p, fd)
                await p.backend.set_doorbell(0, Doorbell.HYPERCALL, None)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)  # polling may have answered before the eventfd was read
                os.eventfd_write(fd, 1)
                await check_it_works(p.guest.queues[0])
                assert os.eventfd_read(fd) == 1  # nobody took it
            os.close(fd)


@every_driven
async def test_a_ring_that_was_counted_before_the_withdrawal_is_served(driven: str) -> None:
    """The count may sit in an eventfd that is about to be closed: taking the doorbell away looks at the ring."""
    async with plugged(make_device(driven), setting_of(driven)) as p:
        queue = p.guest.queues[0]
        for _ in range(20):
            fd = eventfd()
            await p.backend.set_doorbell(0, Doorbell.HYPERCALL, given(fd))
            add_request(queue)
            os.eventfd_write(fd, 1)
            await p.backend.set_doorbell(0, Doorbell.HYPERCALL, None)
            assert len(await queue.used()) == 1
            os.close(fd)


@every_driven
async def test_further_doorbells_go_with_the_queue_that_stops(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        queue, fd = p.guest.queues[0], eventfd()
        await p.backend.set_doorbell(0, Doorbell.PIO, given(fd))
        base = await p.guest.link.stop(0)
        await p.guest.link.set_up(0, queue.driver.size, queue.areas, base)
        await p.guest.link.set_kick(0, queue.kick_fd)
        await p.guest.link.set_call(0, queue.call_fd)
        os.eventfd_write(fd, 1)
        await check_it_works(queue)
        assert os.eventfd_read(fd) == 1  # nobody took it
        os.close(fd)


async def test_a_doorbell_that_is_no_eventfd_is_refused_and_the_queue_goes_on() -> None:
    async with plugged(make_device("io_uring"), setting_of("io_uring")) as p:
        owned = OwnedFd(os.open("/dev/null", os.O_RDWR))
        with pytest.raises(PeerError, match="not an eventfd"):
            await p.backend.set_doorbell(0, Doorbell.PIO, owned)
        assert owned.closed
        owned = given(p.guest.queues[0].kick_fd)
        with pytest.raises(PeerError, match="queue 7 does not exist"):
            await p.backend.set_doorbell(7, Doorbell.PIO, owned)
        assert owned.closed
        await check_it_works(p.guest.queues[0])


@every_driven
async def test_interrupt_status_is_set_before_the_call_eventfd_is_written(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven), start=False) as p:
        status = InterruptStatus()
        p.backend.set_interrupt_status(status)
        assert status.value == 0
        await p.guest.start(queue_size=16, queues=1)
        queue = p.guest.queues[0]
        await queue.interrupt()  # the one that a new call fd always gets
        assert status.value == 1
        status.raise_config()
        assert status.value == 3
        await check_it_works(queue)
        assert status.value == 3
        assert status.address != 0
        status.acknowledge(1)
        assert status.value == 2
        status.clear()
        assert status.value == 0


async def test_whoever_watches_is_told_which_eventfd_kicks_which_queue() -> None:
    async with plugged(make_device("io_uring"), setting_of("io_uring"), start=False) as p:
        seen: list[tuple[int, int | None]] = []
        p.backend.kick_observer = lambda index, number: seen.append((index, number))
        await p.guest.start(queue_size=16, queues=1)
        number = eventfd_id(p.guest.queues[0].kick_fd)
        assert number is not None
        assert seen == [(0, number)]
        await p.guest.link.stop(0)
        assert seen[1:] == [(0, None)]


def test_eventfds_are_told_apart_by_the_kernels_number() -> None:
    one, other = eventfd(), eventfd()
    copy = os.dup(one)
    assert eventfd_id(one) == eventfd_id(copy) != eventfd_id(other)
    reader, writer = os.pipe()
    assert eventfd_id(reader) is None
    for fd in (one, other, copy, reader, writer):
        os.close(fd)
