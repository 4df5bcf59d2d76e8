"""What a guest has sent is the host's to read, even when the guest no longer waits for it (5.10.6.5)."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
from kit.guest.blk import pattern
from kit.guest.vsock import (
    CREDIT_UPDATE,
    EOM,
    RECEIVE_QUEUE,
    RST,
    RW,
    SEQPACKET,
    SHUT_BOTH,
    SHUT_SEND,
    SHUTDOWN,
    GuestSocket,
    HostListener,
    HostSocket,
    VsockGuest,
    pair,
    vsock,
    works,
)

from virtio.devices.vsock.device import Vsock
from virtio.devices.vsock.options import LAST_WORDS_MAX
from virtio.testing import attach


async def fill(inside: GuestSocket, most: int = 1 << 20, piece: int = 65536) -> int:
    """Send until the host's socket is full and there is a backlog; how many bytes (of ``pattern(most, 1)``).

    As messages: whole ones of ``piece`` bytes only.
    """
    data = pattern(most, 1)
    queue = inside.guest.driver.queues[RECEIVE_QUEUE].driver
    least = piece if inside.type == SEQPACKET else 1
    while inside.credit >= least and inside.sent < most:
        at, count = inside.sent, min(inside.credit, piece, most - inside.sent)
        inside.sent += count
        await inside.say(RW, data[at : at + count], flags=EOM if inside.type == SEQPACKET else 0)
        await trio.testing.wait_all_tasks_blocked()
        while queue.has_used():
            assert (await inside.hear()).op == CREDIT_UPDATE
    return inside.sent


def backlog(device: Vsock) -> int:
    return sum(len(connection._backlog) for connection in device._last_words)


@pytest.mark.parametrize("shut", [SHUT_SEND, SHUT_BOTH])
async def test_a_slow_host_gets_all_of_what_a_guest_sent_before_it_closed(shut: int, tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        sent = await fill(inside, 393_216)
        await inside.say(SHUTDOWN, flags=shut)
        await inside.say(RST)
        await trio.testing.wait_all_tasks_blocked()
        assert backlog(device) > 0
        with pytest.raises(BrokenPipeError):
            await outside.send(b"nobody reads this")
        assert await outside.receive(sent) == pattern(sent, 1)
        await outside.at_end()
        await inside.guest.silence()
        assert device._last_words == set()
        outside.close()


async def test_the_same_ports_connect_anew_while_the_host_still_reads_of_the_old_connection(tmp_path: Path) -> None:
    device = vsock(tmp_path, connections=1)
    async with attach(device) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 1024)
        first = await guest.connect(5000, 1024)
        old = await listener.accept()
        sent = await fill(first)
        await first.say(SHUTDOWN, flags=SHUT_BOTH)
        await first.say(RST)
        second = await guest.connect(5000, 1024)
        new = await listener.accept()
        await second.send(b"new")
        assert await new.receive(3) == b"new"
        assert await old.receive(sent) == pattern(sent, 1)
        await old.at_end()
        await new.send(b"still there")
        assert await second.receive(11) == b"still there"
        await guest.silence()
        for each in (old, new, listener):
            each.close()


async def test_messages_are_read_to_the_last_one_though_the_guest_has_closed(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 1024, socket.SOCK_SEQPACKET)
        inside = await guest.connect(5000, 1024, type=SEQPACKET)
        outside = await listener.accept()
        count = await fill(inside, piece=30_000) // 30_000
        await inside.say(RW, b"half of a mess")
        await inside.say(SHUTDOWN, flags=SHUT_BOTH)
        await inside.say(RST)
        assert backlog(device) > 0
        for number in range(count):
            at = number * 30_000
            assert await outside.receive_message() == pattern(1 << 20, 1)[at : at + 30_000]
        await outside.at_end()
        outside.close()
        listener.close()


async def test_what_is_sent_closed_and_reset_at_one_go_arrives(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 1024)
        transmit = driver.queues[1]
        parts = ((1, b""), (RW, b"all at once"), (SHUTDOWN, b""), (RST, b""))
        for op, data in parts:
            transmit.driver.add([guest.packet(op, 5000, 1024, data, flags=SHUT_BOTH if op == SHUTDOWN else 0)], [])
        transmit.kick()
        await transmit.used(len(parts))
        outside = await listener.accept()
        assert await outside.receive(11) == b"all at once"
        await outside.at_end()
        await guest.silence()
        outside.close()
        listener.close()


async def test_a_host_that_never_reads_is_not_waited_for_without_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    device = vsock(tmp_path)
    async with attach(device) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        sent = await fill(inside)
        await inside.say(SHUTDOWN, flags=SHUT_BOTH)
        await inside.say(RST)
        left = backlog(device)
        assert left > 0
        await trio.sleep(3600)
        assert device._last_words == set()
        assert await outside.receive(sent - left) == pattern(sent, 1)[: sent - left]
        await outside.at_end()
        outside.close()


async def test_a_host_that_goes_away_instead_of_reading_ends_it(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await fill(inside)
        await inside.say(SHUTDOWN, flags=SHUT_BOTH)
        await inside.say(RST)
        assert len(device._last_words) == 1
        outside.close()
        await trio.testing.wait_all_tasks_blocked()
        assert device._last_words == set()


async def test_only_so_many_connections_are_kept_for_hosts_that_do_not_read(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 1024)
        kept: list[HostSocket] = []
        for port in range(LAST_WORDS_MAX + 3):
            inside = await guest.connect(port, 1024)
            kept.append(await listener.accept())
            await fill(inside)
            await inside.say(SHUTDOWN, flags=SHUT_BOTH)
            await inside.say(RST)
        assert len(device._last_words) == LAST_WORDS_MAX
        assert device._connections == {}
        await works(guest, tmp_path)
        for outside in kept:
            outside.close()
        listener.close()
        await trio.testing.wait_all_tasks_blocked()
        assert device._last_words == set()


@pytest.mark.parametrize("is_reset_first", [False, True], ids=["open", "closed before"])
async def test_what_a_guest_sent_before_it_closed_outlives_a_reset_of_the_device(
    is_reset_first: bool, tmp_path: Path
) -> None:
    """It turns itself off as soon as it has sent everything."""
    device = vsock(tmp_path)
    async with attach(device) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        sent = await fill(inside)
        await inside.say(SHUTDOWN, flags=SHUT_BOTH)
        if is_reset_first:
            await inside.say(RST)
        await driver.reset()
        assert await outside.receive(sent) == pattern(sent, 1)
        await outside.at_end()
        outside.close()


async def test_the_end_of_the_device_ends_what_the_host_has_not_read(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await fill(inside)
        await inside.say(SHUTDOWN, flags=SHUT_BOTH)
        await inside.say(RST)
        assert backlog(device) > 0
    assert device._last_words == set()
    outside.close()


async def test_a_reset_without_a_shutdown_is_no_end_for_a_host_that_was_not_read(tmp_path: Path) -> None:
    """A Unix socket can say so only where something of the host's was left unread."""
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 1024)
        inside = await guest.connect(5000, 1024, buf_alloc=10)
        outside = await listener.accept()
        await outside.send(bytes(1000))
        assert len((await inside.hear()).data) == 10
        await inside.say(RW, b"only a part")
        await inside.say(RST)
        assert await outside.receive(11) == b"only a part"
        with pytest.raises(ConnectionResetError):
            await outside.receive(1)
        outside.close()
        listener.close()
