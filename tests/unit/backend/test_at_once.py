"""The waist: verbs that come while another one is under way on the same queue."""

from __future__ import annotations

import os

import trio
from kit.front_end.frontend import Setting, every_ring, plugged
from kit.ring.driven import check_it_works, every_driven, make_device

from virtio.fd import OwnedFd
from virtio.waist import Doorbell


def setting_of(driven: str, ring: str = "split") -> Setting:
    return Setting("waist", ring, "" if driven == "pump" else driven)


def given(fd: int) -> OwnedFd:
    return OwnedFd(os.dup(fd))


@every_driven
@every_ring
async def test_a_queue_that_is_stopped_by_several_at_once_stops_once_and_all_learn_where(
    driven: str, ring: str
) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring)) as p:
        queue, backend = p.guest.queues[0], p.backend
        for _ in range(5):
            await check_it_works(queue)
            bases: list[int] = []

            async def stop(bases: list[int] = bases) -> None:
                bases.append(await backend.suspend_queue(0))

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(stop)
            assert bases == [queue.driver.base] * 4
            await p.guest.link.set_up(0, queue.driver.size, queue.areas, bases[0])
        await check_it_works(queue)


@every_driven
async def test_whatever_else_changes_while_a_queue_stops_the_queue_serves_afterwards(driven: str) -> None:
    """A new memory table, call fd or doorbell that arrives in the middle of a stop is the stopped queue's."""
    async with plugged(make_device(driven), setting_of(driven)) as p:
        guest, backend, queue = p.guest, p.backend, p.guest.queues[0]
        for _ in range(5):
            await check_it_works(queue)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(backend.suspend_queue, 0)
                nursery.start_soon(guest.link.share, guest.memory)
                nursery.start_soon(backend.set_call, 0, given(queue.call_fd))
                nursery.start_soon(backend.set_err, 0, given(queue.err_fd))
                nursery.start_soon(backend.set_doorbell, 0, Doorbell.PIO, given(queue.kick_fd))
            await guest.link.set_up(0, queue.driver.size, queue.areas, queue.driver.base)
            await check_it_works(queue)


@every_driven
async def test_a_reset_beside_a_stop_leaves_a_device_that_can_be_started(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        await check_it_works(p.guest.queues[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.backend.stop_queue, 0)
            nursery.start_soon(p.backend.reset)
            nursery.start_soon(p.backend.enable_queue, 0, False)
        p.guest.close()
        guest = await p.connect()
        await guest.start()
        await check_it_works(guest.queues[0])
