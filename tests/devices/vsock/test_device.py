"""The socket device (5.10): the host connects to the guest, the guest to the host, and how connections end."""

from __future__ import annotations

import hashlib
import socket
import struct
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import Setting, every_ring, plugged
from kit.guest.blk import pattern
from kit.guest.vsock import (
    CREDIT_UPDATE,
    EVENT_QUEUE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUT_BOTH,
    SHUT_RECEIVE,
    SHUT_SEND,
    SHUTDOWN,
    TRANSMIT_QUEUE,
    HostListener,
    HostSocket,
    VsockGuest,
    connected_client,
    pair,
    vsock,
)

from virtio.testing import attach

Ring = str


@every_ring
async def test_a_program_of_the_host_connects_and_bytes_go_both_ways(ring: Ring, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path), ring=ring) as driver:  # type: ignore[arg-type]
        guest = VsockGuest(driver)
        client = await connected_client(tmp_path / "vsock", 1234)
        inside = await guest.accept(1234)
        assert await client.greeted() == inside.peer_port
        await client.send(b"question")
        assert await inside.receive(8) == b"question"
        await inside.send(b"answer")
        assert await client.receive(6) == b"answer"
        client.close()


@every_ring
async def test_a_guest_reaches_the_program_that_listens_for_its_port(ring: Ring, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path), ring=ring) as driver:  # type: ignore[arg-type]
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await inside.send(b"hello")
        assert await outside.receive(5) == b"hello"
        await outside.send(b"yes?")
        assert await inside.receive(4) == b"yes?"
        outside.close()


@every_ring
async def test_megabytes_arrive_unchanged_in_both_directions(ring: Ring, tmp_path: Path) -> None:
    up, down = pattern(3_000_001, 1), pattern(2_000_003, 2)
    async with attach(vsock(tmp_path), ring=ring) as driver:  # type: ignore[arg-type]
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outside.send, down)
            assert hashlib.sha256(await inside.receive(len(down))).digest() == hashlib.sha256(down).digest()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inside.send, up)
            assert hashlib.sha256(await outside.receive(len(up))).digest() == hashlib.sha256(up).digest()
        outside.close()


async def test_many_connections_at_once_keep_their_bytes_apart(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 80)
        pairs = []
        for port in range(100):
            inside = await guest.connect(port, 80)
            pairs.append((inside, await listener.accept()))
        for inside, _ in pairs:
            await inside.send(b"%d" % inside.port * 100)
        for inside, outside in pairs:
            expected = b"%d" % inside.port * 100
            assert await outside.receive(len(expected)) == expected
            outside.close()
        listener.close()


async def test_what_a_client_says_behind_its_command_is_for_the_guest(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await client.connect(str(tmp_path / "vsock"))
        await client.send(b"CONNECT 9\nat once")
        inside = await guest.accept(9)
        assert await inside.receive(7) == b"at once"
        client.close()


async def test_a_guest_is_reset_where_nobody_listens(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        await guest.say(REQUEST, 5000, 1024)
        assert (await guest.hear()).meaning == (RST, 1024, 5000)
        (tmp_path / "vsock_1025").write_bytes(b"no socket")
        await guest.say(REQUEST, 5000, 1025)
        assert (await guest.hear()).meaning == (RST, 1025, 5000)


async def test_a_client_is_let_go_without_a_word_when_the_guest_refuses(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        client = await connected_client(tmp_path / "vsock", 99)
        asked = await guest.hear()
        await guest.say(RST, 99, asked.src_port)
        await HostSocket(client.raw).at_end()
        client.close()


async def test_the_hosts_end_leaves_the_other_direction_open(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await outside.send(b"that was all")
        outside.raw.shutdown(socket.SHUT_WR)
        assert await inside.receive(12) == b"that was all"
        told = await inside.hear()
        assert (told.op, told.flags) == (SHUTDOWN, SHUT_SEND)
        await inside.send(b"thanks")
        assert await outside.receive(6) == b"thanks"
        await inside.say(SHUTDOWN, flags=SHUT_SEND)
        await outside.at_end()
        while inside.shut != SHUT_BOTH:
            assert (await inside.hear()).op == SHUTDOWN
        await inside.say(SHUTDOWN, flags=SHUT_BOTH)
        assert (await inside.hear()).op == RST
        outside.close()


async def test_the_guests_end_leaves_the_other_direction_open(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await inside.send(b"request")
        await inside.say(SHUTDOWN, flags=SHUT_SEND)
        assert await outside.receive(7) == b"request"
        await outside.at_end()
        assert (await inside.hear()).meaning == (SHUTDOWN, 1024, 5000)
        await outside.send(b"response")
        assert await inside.receive(8) == b"response"
        outside.close()
        assert (await inside.hear()).flags == SHUT_BOTH


async def test_a_guest_that_closes_is_confirmed_after_the_host_had_everything(tmp_path: Path) -> None:
    data = pattern(200_000, 3)
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await inside.send(data)
        await inside.say(SHUTDOWN, flags=SHUT_BOTH)
        assert await outside.receive(len(data)) == data
        await outside.at_end()
        while (packet := await inside.hear()).op != RST:
            assert packet.op in (SHUTDOWN, CREDIT_UPDATE)
        outside.close()


async def test_a_guest_that_wants_no_more_stops_the_host_from_sending(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        await inside.say(SHUTDOWN, flags=SHUT_RECEIVE)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BrokenPipeError):
            await outside.send(b"too late")
        await inside.send(b"but I have something to say")
        assert await outside.receive(27) == b"but I have something to say"
        outside.close()


async def test_a_program_that_ends_tells_the_guest_about_both_directions(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await outside.send(b"last words")
        outside.close()
        assert await inside.receive(10) == b"last words"
        while inside.shut != SHUT_BOTH:
            assert (await inside.hear()).op == SHUTDOWN
        await inside.send(b"nobody hears this")
        await inside.say(SHUTDOWN, flags=SHUT_BOTH)
        assert (await inside.hear()).op == RST


async def test_a_program_that_finishes_writing_and_ends_later_tells_the_guest_both(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        outside.raw.shutdown(socket.SHUT_WR)
        assert (await inside.hear()).flags == SHUT_SEND
        outside.close()
        assert (await inside.hear()).flags == SHUT_BOTH


async def test_last_words_arrive_though_the_guest_was_still_sending(tmp_path: Path) -> None:
    """A server that answers before it has read everything, and closes."""
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        await outside.send(b"413 too large")
        outside.close()
        await guest.say(RW, 5000, 1024, bytes(60_000))
        assert await inside.receive(13) == b"413 too large"
        while inside.shut != SHUT_BOTH:
            assert (await inside.hear()).op == SHUTDOWN


async def test_a_reset_of_the_guests_closes_the_hosts_socket(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await inside.say(RST)
        await outside.at_end()
        await inside.guest.silence()
        outside.close()


async def test_a_connection_that_has_ended_and_is_not_confirmed_is_reset_after_a_while(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        outside.close()
        assert (await inside.hear()).flags == SHUT_BOTH
        assert (await inside.hear()).op == RST


async def test_a_guest_that_does_not_answer_is_not_waited_for_without_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        client = await connected_client(tmp_path / "vsock", 7)
        asked = await guest.hear()
        await client.at_end()
        assert (await guest.hear()).op == RST
        await guest.say(RESPONSE, 7, asked.src_port)
        assert (await guest.hear()).op == RST
        client.close()


async def test_a_client_that_says_nothing_is_let_go(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with attach(vsock(tmp_path)):
        client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await client.connect(str(tmp_path / "vsock"))
        await HostSocket(client).at_end()
        client.close()


async def test_a_reset_of_the_device_ends_every_connection_and_it_serves_the_next_driver(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        _, outside = await pair(VsockGuest(driver), tmp_path)
        waiting = await connected_client(tmp_path / "vsock", 1)
        await trio.testing.wait_all_tasks_blocked()
        await driver.reset()
        await outside.at_end()
        await waiting.at_end()
        outside.close()
        waiting.close()
        guest = VsockGuest(driver)
        (tmp_path / "vsock_1024").unlink()
        inside, outside = await pair(guest, tmp_path)
        await inside.send(b"again")
        assert await outside.receive(5) == b"again"
        outside.close()


async def test_the_driver_reads_its_context_id(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path, cid=0xFFFF_FFFE)) as driver:
        assert struct.unpack("<Q", driver.read_config(0, 8)) == (0xFFFF_FFFE,)
        assert len(driver.queues) == 3


async def test_a_fresh_driver_hears_of_no_transport_reset(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        driver.post(EVENT_QUEUE, writable=4)
        await VsockGuest(driver).silence()
        await driver.reset()
        driver.post(EVENT_QUEUE, writable=4)
        await trio.testing.wait_all_tasks_blocked()
        assert driver.queues[EVENT_QUEUE].driver.used() == []


@every_ring
async def test_a_driver_in_the_middle_of_things_hears_that_its_connections_are_gone(ring: Ring, tmp_path: Path) -> None:
    """We died and were started again, or the guest has moved here: 5.10.6.9."""
    async with plugged(vsock(tmp_path), Setting("waist", ring)) as p:
        events, transmit = p.guest.queues[EVENT_QUEUE], p.guest.queues[TRANSMIT_QUEUE]
        await transmit.request([bytes(44)], [])
        events.driver.add([], [4])
        await p.guest.link.reset()
        await p.guest.negotiate()
        await p.guest.link.share(p.guest.memory)
        await p.guest.start_queue(TRANSMIT_QUEUE, transmit.driver.base)
        await p.guest.start_queue(EVENT_QUEUE)
        (used,) = await events.used()
        assert used.buffers == [bytes(4)]  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
        events.driver.add([], [4])
        events.kick()
        await trio.testing.wait_all_tasks_blocked()
        assert events.driver.used() == []


@every_ring
async def test_queues_that_stop_and_start_lose_nothing_of_a_connection(ring: Ring, tmp_path: Path) -> None:
    async with plugged(vsock(tmp_path), Setting("waist", ring)) as p:
        inside, outside = await pair(VsockGuest(p.guest), tmp_path)
        sent, received = b"", b""
        for turn in range(20):
            bases = [await p.guest.link.stop(index) for index in range(3)]
            await outside.send(pattern(10_000, turn))
            sent += pattern(10_000, turn)
            for index, base in enumerate(bases):
                await p.guest.start_queue(index, base)
            received += (await inside.hear()).data
        assert received + await inside.receive(len(sent) - len(received)) == sent
        outside.close()
