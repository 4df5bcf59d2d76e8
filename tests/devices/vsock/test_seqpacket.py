"""Messages over the socket device (5.10.6.4, VIRTIO_VSOCK_F_SEQPACKET): what was sent as one arrives as one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import Setting, every_ring, plugged
from kit.guest.blk import pattern
from kit.guest.vsock import (
    EOM,
    F_SEQPACKET,
    REQUEST,
    RST,
    RW,
    SEQPACKET,
    SHUT_BOTH,
    SHUTDOWN,
    GuestSocket,
    HostListener,
    HostSocket,
    VsockGuest,
    connected_client,
    vsock,
)
from kit.host.peak import Peak

from virtio.testing import attach

SIZES = [1, 2, 43, 44, 45, 4095, 4096, 4097, 65535, 65536, 65537, 200_000, 256 * 1024]


async def message_pair(guest: VsockGuest, folder: Path, buf_alloc: int = 1 << 18) -> tuple[GuestSocket, HostSocket]:
    listener = HostListener(folder, 1024, socket.SOCK_SEQPACKET)
    inside = await guest.connect(5000, 1024, type=SEQPACKET, buf_alloc=buf_alloc)
    outside = await listener.accept()
    outside.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    listener.close()
    return inside, outside


@every_ring
async def test_messages_of_the_guest_arrive_one_by_one(ring: str, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path), ring=ring) as driver:  # type: ignore[arg-type]
        inside, outside = await message_pair(VsockGuest(driver), tmp_path)
        for size in SIZES:
            await inside.send(pattern(size, size))
            assert await outside.receive_message() == pattern(size, size)
        for size in SIZES[:6]:
            await inside.send(pattern(size, 1))
        for size in SIZES[:6]:
            assert await outside.receive_message() == pattern(size, 1)
        outside.close()


@every_ring
async def test_messages_of_the_host_arrive_one_by_one(ring: str, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path), ring=ring) as driver:  # type: ignore[arg-type]
        guest = VsockGuest(driver)
        client = await connected_client(tmp_path / "vsock.seqpacket", 77, socket.SOCK_SEQPACKET)
        client.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        inside = await guest.accept(77, type=SEQPACKET)
        await client.greeted()
        for size in SIZES:
            await client.send(pattern(size, size))
            assert await inside.receive_message() == pattern(size, size)
        for size in SIZES[:6]:
            await client.send(pattern(size, 1))
        for size in SIZES[:6]:
            assert await inside.receive_message() == pattern(size, 1)
        client.close()


async def test_an_empty_message_is_a_message_and_not_the_end(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await message_pair(VsockGuest(driver), tmp_path)
        await outside.raw.send(b"")
        await outside.raw.send(b"after nothing")
        assert await inside.receive_message() == b""
        assert await inside.receive_message() == b"after nothing"
        await inside.send(b"")
        await inside.send(b"said too")
        assert await outside.receive_message() == b""
        assert await outside.receive_message() == b"said too"
        outside.close()
        assert (await inside.hear()).meaning == (SHUTDOWN, 1024, 5000)
        assert inside.shut == SHUT_BOTH


async def test_a_message_in_many_packets_stays_one(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await message_pair(VsockGuest(driver), tmp_path)
        await inside.send(pattern(10_000, 4), piece=7)
        assert await outside.receive_message() == pattern(10_000, 4)
        await inside.send(b"no ", end=False)
        await trio.testing.wait_all_tasks_blocked()
        with socket.socket(fileno=os.dup(outside.raw.fileno())) as plain, pytest.raises(BlockingIOError):
            plain.recv(10, socket.MSG_DONTWAIT)
        await inside.send(b"end")
        assert await outside.receive_message() == b"no end"
        outside.close()


async def test_a_message_is_cut_to_the_credit_of_the_guest_and_stays_one(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver, room=100)
        inside, outside = await message_pair(guest, tmp_path, buf_alloc=1000)
        await outside.send(pattern(700, 1))
        await outside.send(pattern(1000, 2))
        first = [await inside.hear() for _ in range(7)]
        assert [packet.flags for packet in first] == [0] * 6 + [EOM]
        second = [await inside.hear() for _ in range(3)]
        assert [packet.len for packet in second] == [100] * 3
        assert not any(packet.flags & EOM for packet in second)
        await inside.say(6)
        rest = await inside.receive_message()
        assert b"".join(packet.data for packet in second) + rest == pattern(1000, 2)
        outside.close()


async def test_a_message_longer_than_the_guests_buffer_ends_the_connection(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await message_pair(VsockGuest(driver), tmp_path, buf_alloc=1000)
        await outside.send(bytes(1000))
        await outside.send(bytes(1001))
        assert await inside.receive_message() == bytes(1000)
        assert (await inside.hear()).op == RST
        with pytest.raises(ConnectionResetError):  # not an end like any other: its message was not read
            await outside.receive(1)
        outside.close()


async def test_a_message_longer_than_the_buffer_ends_the_connection_though_the_guest_reads_nothing(
    tmp_path: Path,
) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await message_pair(VsockGuest(driver), tmp_path, buf_alloc=1000)
        await outside.send(bytes(1000))
        await outside.send(bytes(1001))
        assert len((await inside.hear()).data) == 1000
        assert (await inside.hear()).op == RST  # of no use is to wait for credit: it would never be enough
        outside.close()


@every_ring
async def test_a_message_that_the_guest_has_a_part_of_goes_on_when_its_queues_do(ring: str, tmp_path: Path) -> None:
    async with plugged(vsock(tmp_path), Setting("waist", ring)) as p:
        inside, outside = await message_pair(VsockGuest(p.guest, room=1000, buffers=2), tmp_path)
        await outside.send(pattern(30_000, 1))
        await outside.send(b"the next")
        first = b""
        for _ in range(5):
            first += (await inside.hear()).data
            bases = [await p.guest.link.stop(index) for index in range(3)]
            for index, base in enumerate(bases):
                await p.guest.start_queue(index, base)
        assert first + await inside.receive_message() == pattern(30_000, 1)
        assert await inside.receive_message() == b"the next"
        outside.close()


async def test_a_guest_that_never_reads_messages_costs_no_memory(tmp_path: Path) -> None:
    """It begins to take the longest message there is on each of its connections, and never gives room for the rest."""
    count, message = 100, pattern(200_000, 1)
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver, room=100, buffers=1)
        listener = HostListener(tmp_path, 1024, socket.SOCK_SEQPACKET)
        pairs = []
        for port in range(count):
            inside = await guest.connect(port, 1024, type=SEQPACKET, buf_alloc=256 * 1024)
            pairs.append((inside, await listener.accept()))
        await trio.testing.wait_all_tasks_blocked()
        peak = Peak()
        for _, outside in pairs:
            outside.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            await outside.raw.send(message)
        await trio.testing.wait_all_tasks_blocked()
        heard = [await guest.hear() for _ in pairs]
        assert {packet.len for packet in heard} == {100}
        assert peak.kib < 4 << 10
        for _, outside in pairs:
            outside.close()
        listener.close()


async def test_messages_nobody_takes_are_bounded_though_they_are_empty(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await message_pair(guest, tmp_path)
        transmit = driver.queues[1]
        packet = guest.packet(RW, 5000, 1024, type=SEQPACKET, flags=EOM)
        for _ in range(150):
            for _ in range(60):
                transmit.driver.add([packet], [])
            transmit.kick()
            await transmit.used(60)
        assert (await inside.hear()).op == RST
        outside.close()


async def test_without_the_feature_there_are_no_messages(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path), without=[F_SEQPACKET]) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 1024, socket.SOCK_SEQPACKET)
        await guest.say(REQUEST, 5000, 1024, type=SEQPACKET)
        assert (await guest.hear()).op == RST
        listener.close()
        client = await connected_client(tmp_path / "vsock.seqpacket", 77, socket.SOCK_SEQPACKET)
        await client.at_end()
        await guest.silence()
        client.close()


async def test_a_stream_does_not_come_to_a_socket_for_messages_nor_the_other_way(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        listeners = HostListener(tmp_path, 1, socket.SOCK_SEQPACKET), HostListener(tmp_path, 2)
        await guest.say(REQUEST, 5000, 1)
        assert (await guest.hear()).meaning == (RST, 1, 5000)
        await guest.say(REQUEST, 5000, 2, type=SEQPACKET)
        assert (await guest.hear()).meaning == (RST, 2, 5000)
        for listener in listeners:
            listener.close()
