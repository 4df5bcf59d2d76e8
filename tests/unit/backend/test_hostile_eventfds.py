"""Eventfds of a peer that would hold or wake the daemon for ever: a little cost, then the connection or queue ends."""

from __future__ import annotations

import os

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
from kit.front_end.frontend import Setting, plugged
from kit.front_end.links import SocketLink
from kit.ring.driven import check_it_works, every_driven, make_device
from structlog.testing import capture_logs

from virtio.errors import PeerError
from virtio.fd import OwnedFd
from virtio.testing.queue import GUARD
from virtio.waist import QueueBroken

FULL = (1 << 64) - 2
SET_VRING_CALL = 13


def setting_of(driven: str, way: str = "waist") -> Setting:
    return Setting(way, "split", "" if driven == "pump" else driven)


def full(flags: int = 0) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | flags)
    os.eventfd_write(fd, FULL)
    return fd


@every_driven
async def test_a_full_blocking_call_fd_is_the_front_ends_mistake_and_the_queue_goes_on(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        for _ in range(3):
            with pytest.raises(PeerError, match="keeps full") as raised:
                await p.backend.set_call(0, OwnedFd(full()))
            assert raised.value.final
        await check_it_works(p.guest.queues[0])


@every_driven
async def test_the_first_full_blocking_call_fd_ends_the_connection_of_who_asked_for_a_reply_too(driven: str) -> None:
    with capture_logs() as logs:
        async with plugged(make_device(driven), setting_of(driven, "socket")) as p:
            assert isinstance(p.guest.link, SocketLink)
            front_end, fd = p.guest.link.front_end, full()
            await front_end.send(wire.message(SET_VRING_CALL, wire.u64(0), need_reply=True), [fd])
            assert await front_end.ended()
            p.guest.close()
            guest = await p.connect()
            await guest.start()
            await check_it_works(guest.queues[0])
    ended = [entry for entry in logs if entry["event"].startswith("connection ended: the front-end broke")]
    assert ["keeps full" in entry["error"] for entry in ended] == [True]


@every_driven
async def test_a_kick_fd_that_counts_down_without_end_breaks_its_queue_and_wakes_nobody_any_more(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        backend, queue = p.backend, p.guest.queues[0]
        await check_it_works(queue)
        await backend.set_kick(0, OwnedFd(full(os.EFD_SEMAPHORE)))
        if driven != "io_uring":  # whose polls wake for what is written, and not for what is left
            with trio.fail_after(GUARD):
                event = await backend.next_event()
            assert isinstance(event, QueueBroken)
            assert "EFD_SEMAPHORE" in str(event.error)
            before = backend.stats().queues[0].wakeups
            for _ in range(20):  # each is a round trip to whoever drives the queue
                await backend.set_err(0, OwnedFd(os.eventfd(0)))
            assert backend.stats().queues[0].wakeups <= before + 1
        await backend.reset()
        p.guest.close()
        guest = await p.connect()
        await guest.start()
        await check_it_works(guest.queues[0])
