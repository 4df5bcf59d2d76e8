"""The socket device's credit (5.10.6.3) and limits: whoever does not read makes the other wait; nothing piles up."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import every_ring
from kit.front_end.vhost_user_wire import no_further_descriptors
from kit.guest.blk import pattern
from kit.guest.vsock import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    RECEIVE_QUEUE,
    REQUEST,
    RST,
    RW,
    TRANSMIT_QUEUE,
    HostListener,
    VsockGuest,
    connected_client,
    pair,
    send_many,
    vsock,
    works,
)

from virtio.devices.vsock.device import RESETS_MAX
from virtio.devices.vsock.shares import BUFFER
from virtio.testing import attach


async def test_more_than_the_credit_ends_the_connection(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        sent, op = 0, CREDIT_UPDATE
        while op == CREDIT_UPDATE:
            await guest.say(RW, 5000, 1024, bytes(65536))
            sent += 65536
            await trio.testing.wait_all_tasks_blocked()
            if driver.queues[RECEIVE_QUEUE].driver.has_used():
                op = (await inside.hear()).op
        assert op == RST
        # What the kernel keeps for the two sockets, and our own buffer: not a byte more was kept.
        assert sent <= 2 * BUFFER + (1 << 20)
        await works(guest, tmp_path)
        outside.close()


async def test_a_host_that_never_reads_is_felt_as_credit_and_harms_no_other_connection(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        sent = 0
        while inside.credit > 0:
            piece = pattern(min(inside.credit, 65536), sent)
            inside.sent += len(piece)
            sent += len(piece)
            await inside.say(RW, piece)
            await trio.testing.wait_all_tasks_blocked()
            while driver.queues[RECEIVE_QUEUE].driver.has_used():
                assert (await inside.hear()).op == CREDIT_UPDATE
        await works(guest, tmp_path)
        received = await outside.receive(65536)
        assert received == pattern(65536, 0)
        await outside.receive(sent - 65536)
        while inside.credit < BUFFER // 2:
            assert (await inside.hear()).op == CREDIT_UPDATE
        outside.close()


async def test_a_guest_that_never_reads_stops_the_host_and_nothing_is_kept_for_it(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver, room=65536, buffers=16)
        listener = HostListener(tmp_path, 1024)
        inside = await guest.connect(5000, 1024, buf_alloc=10_000)
        outside = await listener.accept()
        sent = 0
        with trio.move_on_after(0.3):
            while True:
                sent += await outside.raw.send(bytes(65536))
        assert sent < 2 << 20
        heard = [await inside.hear(), await inside.hear()]
        assert [(packet.op, packet.len) for packet in heard] == [(RW, 10_000), (CREDIT_REQUEST, 0)]
        await guest.silence()
        await inside.say(CREDIT_UPDATE, fwd_cnt=5_000)
        assert ((await inside.hear()).len, inside.received) == (5_000, 15_000)
        outside.close()
        listener.close()


@pytest.mark.parametrize("fwd_cnt", [1, 0x7FFF_FFFF, 5_000_000], ids=hex)
async def test_credit_that_cannot_be_sends_nothing(fwd_cnt: int, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        await inside.say(CREDIT_UPDATE, fwd_cnt=fwd_cnt)  # of bytes that were never sent
        await outside.send(b"x")
        assert (await inside.hear()).op == CREDIT_REQUEST
        await guest.silence()
        await inside.say(CREDIT_UPDATE, fwd_cnt=0)
        assert await inside.receive(1) == b"x"
        outside.close()


async def test_counters_wrap_around(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        (connection,) = device._connections.values()
        connection._tx_cnt = 0xFFFF_FFF0
        connection._rx_cnt = connection._fwd_cnt = connection._told_fwd_cnt = 0xFFFF_FFF0
        inside.received = 0xFFFF_FFF0
        await inside.say(CREDIT_UPDATE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outside.send, pattern(300_000, 1))
            assert await inside.receive(300_000) == pattern(300_000, 1)
        await inside.say(RW, b"over the edge, and on")
        assert await outside.receive(21) == b"over the edge, and on"
        await inside.say(CREDIT_REQUEST)
        assert (await inside.hear()).fwd_cnt == 5
        outside.close()


async def test_a_question_for_credit_is_answered(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await inside.send(b"123")
        await inside.say(CREDIT_REQUEST)
        answer = await inside.hear()
        assert (answer.op, answer.buf_alloc, answer.fwd_cnt) == (CREDIT_UPDATE, BUFFER, 3)
        outside.close()


# ---- floods ----


@every_ring
async def test_there_are_no_more_connections_than_allowed(ring: str, tmp_path: Path) -> None:
    device = vsock(tmp_path, connections=20)
    async with attach(device, ring=ring) as driver:  # type: ignore[arg-type]
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 22)
        sockets = []
        for port in range(20):
            sockets.append((await guest.connect(port, 22), await listener.accept()))
        client = await connected_client(tmp_path / "vsock", 7)
        await client.at_end()
        client.close()
        await send_many(driver.queues[TRANSMIT_QUEUE], [guest.packet(REQUEST, port, 22) for port in range(100, 5000)])
        assert len(device._connections) == 20
        assert len(device._resets) <= RESETS_MAX
        while (packet := await guest.hear()).dst_port != 100 + 200:
            assert packet.op == RST
        for inside, outside in sockets:
            await guest.say(RST, inside.port, 22)
            await outside.at_end()
            outside.close()
        assert device._connections == {}
        listener.close()


async def test_resets_for_a_guest_that_gives_no_buffers_are_bounded(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        guest = VsockGuest(driver, buffers=0)
        await send_many(driver.queues[TRANSMIT_QUEUE], [guest.packet(RW, port, 22) for port in range(3 * RESETS_MAX)])
        assert len(device._resets) == RESETS_MAX
        guest.post(32)
        for port in range(RESETS_MAX):
            assert (await guest.hear()).meaning == (RST, 22, port)
        await guest.silence()
        await works(guest, tmp_path)


async def test_single_bytes_without_end_take_no_more_room_than_their_number(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        guest = VsockGuest(driver)
        _, outside = await pair(guest, tmp_path)
        packets = [guest.packet(RW, 5000, 1024, b"x")] * 60
        for _ in range(100):
            await send_many(driver.queues[TRANSMIT_QUEUE], packets)
        (connection,) = device._connections.values()
        assert len(connection._backlog) < 2 * BUFFER
        assert await outside.receive(6000) == b"x" * 6000
        outside.close()


async def test_a_guest_that_opens_and_closes_without_end_leaves_nothing_behind(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 22)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for round_ in range(200):
            inside = await guest.connect(round_, 22)
            outside = await listener.accept()
            await inside.say(RST)
            await outside.at_end()
            outside.close()
        await trio.testing.wait_all_tasks_blocked()
        assert device._connections == {}
        assert len(device._waiting) == 0
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
        listener.close()


async def test_a_lack_of_descriptors_refuses_what_is_new_and_harms_nothing_else(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        listener = HostListener(tmp_path, 22)
        client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with no_further_descriptors():
            await guest.say(REQUEST, 1, 22)
            assert (await guest.hear()).op == RST
            await client.connect(str(tmp_path / "vsock"))
            await client.send(b"CONNECT 5\n")
            await inside.send(b"still here")
            assert await outside.receive(10) == b"still here"
        assert (await guest.hear()).op == REQUEST  # the client had only to wait
        client.close()
        outside.close()
        listener.close()
