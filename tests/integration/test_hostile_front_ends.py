"""What a front-end does with descriptors, memory and its connection, odd or hostile: it harms only itself."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
from kit.front_end.frontend import Guest, every_ring
from kit.front_end.links import SocketLink
from kit.front_end.scene import Scene
from kit.front_end.vhost_user_wire import MIB, eventfd, mem_table, memfd, message, region, u64, vring_addr, vring_state
from kit.guest.blk import S_OK, T_IN, BlkDriver, VerifiedLoad, header

from virtio.testing.driver import GuestMemory
from virtio.testing.queue import GUARD

GPA, UVA = 0x4000_0000, 0x7F00_0000_0000
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, SET_VRING_ENABLE = 12, 13, 14, 18
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, SET_BACKEND_REQ_FD, GET_CONFIG = 15, 16, 21, 24
ADD_MEM_REG, REM_MEM_REG = 37, 38

Fds = Callable[[], Sequence[int]]


def no_fds() -> Sequence[int]:
    return ()


def one_eventfd() -> Sequence[int]:
    return [eventfd()]


def one_socket() -> Sequence[int]:
    ours, theirs = socket.socketpair()
    ours.close()
    return [theirs.detach()]


def front_end_of(guest: Guest) -> wire.FrontEnd:
    assert isinstance(guest.link, SocketLink)
    return guest.link.front_end


# --- odd, and legal (items 11, 12, 14) ---


async def every_byte_alone(front_end: wire.FrontEnd) -> None:
    for byte in message(GET_FEATURES):
        await front_end.send(bytes([byte]))
    assert (await front_end.receive())[0] == GET_FEATURES


async def many_messages_at_once(front_end: wire.FrontEnd) -> None:
    await front_end.send(message(GET_FEATURES) * 100 + message(GET_PROTOCOL_FEATURES) * 100)
    for n in range(200):
        assert (await front_end.receive())[0] == (GET_FEATURES if n < 100 else GET_PROTOCOL_FEATURES)


@pytest.mark.parametrize("talk", [every_byte_alone, many_messages_at_once])
async def test_how_messages_are_cut_up_does_not_matter(
    scene: Scene, talk: Callable[[wire.FrontEnd], Awaitable[None]]
) -> None:
    guest = await scene.connect()
    try:
        await talk(front_end_of(guest))
        await guest.start()
        await BlkDriver(guest.queues[0]).write(0, bytes(512))
    finally:
        guest.close()
    await scene.aftermath()


@every_ring
async def test_one_eventfd_may_be_everything_at_once(scene: Scene, ring: str) -> None:
    guest = await scene.started(ring)
    try:
        shared = guest.queues[0].kick_fd
        for index in range(2):
            await guest.link.set_kick(index, shared)
            await guest.link.set_call(index, shared)
            await guest.link.set_err(index, shared)
        for _ in range(10):
            for queue in guest.queues:
                queue.driver.add([header(T_IN)], [512, 1])
            with trio.fail_after(GUARD):
                while not all(queue.driver.has_used() for queue in guest.queues):
                    os.eventfd_write(shared, 1)  # whoever reads it first takes the kick away from the other
                    await trio.lowlevel.checkpoint()
            for queue in guest.queues:
                assert [used.buffers[1] for used in queue.driver.used()] == [bytes([S_OK])]
        await scene.unharmed()
    finally:
        guest.close()
    await scene.aftermath()


async def test_queues_that_are_started_enabled_and_stopped_in_any_order_stay_right(scene: Scene) -> None:
    guest = await scene.started()
    try:
        front_end = front_end_of(guest)
        for _ in range(20):
            for on in (0, 1, 1, 0, 0, 1):
                assert await front_end.do(SET_VRING_ENABLE, vring_state(0, on)) == 0
            for fd_request in (SET_VRING_KICK, SET_VRING_CALL):
                fd = guest.queues[0].kick_fd if fd_request == SET_VRING_KICK else guest.queues[0].call_fd
                assert await front_end.do(fd_request, u64(0), [os.dup(fd)]) == 0
            await BlkDriver(guest.queues[0]).write(0, bytes(512))
            base = await guest.link.stop(0)
            assert await guest.link.stop(0) == base  # once more is no mistake
            await guest.start_queue(0, base)
    finally:
        guest.close()
    await scene.aftermath()


# --- eventfds as weapons ---


@every_ring
async def test_a_call_eventfd_that_is_full_and_blocking_breaks_its_queue_and_holds_up_nobody(
    scene: Scene, ring: str
) -> None:
    guest = await scene.started(ring)
    full = os.eventfd(0, os.EFD_CLOEXEC)  # blocking
    try:
        mark = scene.log.mark
        await guest.link.set_call(0, full)
        assert os.eventfd_read(full) == 1
        os.eventfd_write(full, 2**64 - 2)
        queue = guest.queues[0]
        queue.driver.want_interrupts(True)
        queue.driver.add([header(T_IN)], [512, 1])
        queue.ring()
        await scene.unharmed()
        await queue.broken()
        entry = await scene.log.expect(mark, "queue broken")
        assert "the call eventfd is kept full by the other side" in entry["error"]
        await BlkDriver(guest.queues[1]).write(0, bytes(512))
        await guest.link.reset()
        guest.forget_queues()
        await guest.start()
        await BlkDriver(guest.queues[0]).write(0, bytes(512))
    finally:
        os.close(full)
        guest.close()
    await scene.aftermath()


async def test_a_call_eventfd_that_is_full_when_it_is_given_ends_its_connection_and_nothing_else(scene: Scene) -> None:
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(full, 2**64 - 2)
    try:
        for index in range(2):
            guest = await scene.started()
            front_end = front_end_of(guest)
            await front_end.send(message(13, u64(index)), [os.dup(full)])  # would be signalled once
            assert await front_end.ended()
            guest.close()
            await scene.unharmed()
    finally:
        os.close(full)
    await scene.aftermath()


@every_ring
async def test_a_kick_eventfd_that_is_never_empty_holds_up_nobody(scene: Scene, ring: str) -> None:
    guest = await scene.started(ring)
    storm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
    os.eventfd_write(storm, 2**64 - 2)
    try:
        await guest.link.set_kick(0, storm)
        for _ in range(5):
            await scene.unharmed()
            await BlkDriver(guest.queues[1]).write(0, bytes(512))
        await BlkDriver(guest.queues[0]).write(0, bytes(512))
    finally:
        os.close(storm)
        guest.close()
    await scene.aftermath()


# --- memory that is taken away with requests under way (item 13) ---


@every_ring
async def test_memory_is_exchanged_and_removed_with_requests_under_way(scene: Scene, ring: str) -> None:
    guest = await scene.started(ring)
    front_end = front_end_of(guest)
    other = GuestMemory(MIB, gpa=0x9000_0000, uva=0x6F00_0000_0000, name="other")
    try:
        load = VerifiedLoad(guest.queues[1])
        more = wire.single_region(other.gpa, other.size, other.uva)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            for _ in range(20):
                assert await front_end.do(ADD_MEM_REG, more, [os.dup(other.fd)]) == 0
                assert await front_end.do(REM_MEM_REG, more) == 0
                await guest.link.share(guest.memory)
            await load.progress()
            nursery.cancel_scope.cancel()
        mark = scene.log.mark
        whole = wire.single_region(guest.memory.gpa, guest.memory.size, guest.memory.uva)
        assert await front_end.do(REM_MEM_REG, whole) == 0
        for queue in guest.queues:
            queue.ring()
            await queue.broken()
        broken = await scene.log.expect_all(mark, "queue broken", 2)
        assert sorted(entry["queue"] for entry in broken) == [0, 1]
        assert await front_end.do(REM_MEM_REG, whole) != 0  # there is no such region any more
        await scene.unharmed()
    finally:
        guest.close()
        other.close()
    await scene.aftermath()


# --- coming and going (item 19) ---


async def test_a_front_end_may_leave_at_any_point_of_the_conversation(scene: Scene) -> None:
    memory_table = mem_table(region(GPA, 4 * MIB, UVA))
    steps: list[tuple[bytes, Fds]] = [
        (message(GET_FEATURES), no_fds),
        (message(SET_PROTOCOL_FEATURES, u64(wire.ALL_PROTOCOL_FEATURES)), no_fds),
        (message(SET_OWNER) + message(SET_FEATURES, u64(1 << 32 | 1 << 30)), no_fds),
        (message(SET_BACKEND_REQ_FD), one_socket),
        (message(SET_MEM_TABLE, memory_table), lambda: [memfd(4 * MIB)]),
        (message(SET_VRING_NUM, vring_state(0, 64)) + message(SET_VRING_BASE, vring_state(0, 0)), no_fds),
        (message(SET_VRING_ADDR, vring_addr(0, UVA + 0x1000, UVA + 0x2000, UVA + 0x3000)), no_fds),
        (message(SET_VRING_ERR, u64(0)), one_eventfd),
        (message(SET_VRING_CALL, u64(0)), one_eventfd),
        (message(SET_VRING_KICK, u64(0)), one_eventfd),
        (message(SET_VRING_ENABLE, vring_state(0, 1)), no_fds),
        (message(GET_CONFIG, wire.config(0, bytes(60))), no_fds),
        (message(GET_VRING_BASE, vring_state(0, 0)), no_fds),
    ]
    await scene.unoccupied()
    for last, (data, fds) in enumerate(steps):
        for cut in sorted({1, 11, 12, len(data) // 2, len(data) - 1, len(data)} & set(range(1, len(data) + 1))):
            mark = scene.log.mark
            with await wire.FrontEnd.connect(scene.victim) as front_end:
                for whole, their_fds in steps[:last]:
                    await front_end.send(whole, their_fds())
                await front_end.send(data[:cut], fds())
            await scene.log.expect(mark, "connection ended: the front-end left")
    await scene.aftermath()


@every_ring
async def test_a_guest_may_die_with_its_rings_full(scene: Scene, ring: str) -> None:
    for _ in range(10):
        guest = await scene.started(ring)
        for queue in guest.queues:
            for _ in range(21):
                queue.driver.add([header(T_IN)], [4096, 1])
            queue.ring()
        guest.close()
    await scene.aftermath()


async def test_a_second_front_end_is_refused_and_the_first_goes_on(scene: Scene) -> None:
    guest = await scene.started()
    try:
        mark, before = scene.log.mark, scene.counters()
        load = VerifiedLoad(guest.queues[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            for _ in range(30):
                with await wire.FrontEnd.connect(scene.victim) as second:
                    assert await second.ended()
            await load.progress()
            nursery.cancel_scope.cancel()
        assert scene.counters().refused == before.refused + 30
        assert scene.counters().connections == before.connections
        (entry,) = scene.log.since(mark, "a second front-end was refused")
        assert (entry["device"], entry["level"]) == ("victim", "warning")
    finally:
        guest.close()
    await scene.aftermath()


async def test_a_front_end_that_reads_no_replies_holds_up_nobody(scene: Scene) -> None:
    guest = await scene.connect()
    try:
        await guest.negotiate()
        front_end = front_end_of(guest)
        flood = message(GET_FEATURES) * 1000
        sock = socket.socket(fileno=os.dup(front_end.socket.fileno()))
        with sock, contextlib.suppress(BlockingIOError):
            while True:  # until its replies fill the socket, so that it reads no more
                sock.send(flood, socket.MSG_DONTWAIT)
        for _ in range(5):
            await scene.unharmed()
    finally:
        guest.close()
    await scene.aftermath()
