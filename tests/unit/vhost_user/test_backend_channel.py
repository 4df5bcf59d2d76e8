"""Requests of our own: built, sent over a real socket, acknowledged, and never waited for without a limit."""

from __future__ import annotations

import os
import socket
import struct

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
import trio.testing

from transports.vhost_user.serving.backend_channel import BackendChannel, BackendRequests
from virtio.errors import PeerError
from virtio.fd import OwnedFd
from virtio.waist import ConfigChanged, IotlbMiss, Permission

MISS = IotlbMiss(0x4000, Permission.READ | Permission.WRITE)


def channel_and_peer(*, wants_replies: bool) -> tuple[BackendChannel, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return BackendChannel(OwnedFd(ours.detach()), wants_replies=wants_replies), theirs


def test_requests_are_built_as_the_text_says() -> None:
    plain = BackendRequests(wants_replies=False)
    assert plain.build(ConfigChanged()) == wire.message(2)
    assert plain.build(MISS) == wire.message(1, wire.iotlb(1, 0x4000, perm=3))
    assert plain.outstanding is None
    asking = BackendRequests(wants_replies=True)
    assert asking.build(ConfigChanged()) == wire.message(2, need_reply=True)
    assert asking.outstanding == "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG"


@wire.chunked
@pytest.mark.parametrize("status", [0, 1, 2**64 - 1])
def test_an_acknowledgement_is_understood_in_any_pieces(chunk: int, status: int) -> None:
    requests = BackendRequests(wants_replies=True)
    requests.build(MISS)
    ack = wire.reply_to(1, wire.u64(status))
    step = chunk or len(ack)
    results = [requests.receive(ack[at : at + step]) for at in range(0, len(ack), step)]
    assert results == [None] * (len(results) - 1) + [status]
    assert requests.outstanding is None


@pytest.mark.parametrize(
    "answer",
    [
        wire.reply_to(2, wire.u64(0)),
        wire.reply_to(1, b""),
        wire.reply_to(1, bytes(9)),
        wire.message(1, wire.u64(0)),
        struct.pack("=III", 1, 6, 8),
        struct.pack("=III", 1, 5, 2**32 - 1),
    ],
    ids=["other_request", "empty", "too_long", "no_reply", "version_2", "size_2**32-1"],
)
def test_a_wrong_acknowledgement_is_the_front_ends_fault(answer: bytes) -> None:
    requests = BackendRequests(wants_replies=True)
    requests.build(MISS)
    with pytest.raises(PeerError, match="answered with") as caught:
        requests.receive(answer)
    assert caught.value.request == "VHOST_USER_BACKEND_IOTLB_MSG"


async def test_without_reply_ack_nothing_is_waited_for() -> None:
    with wire.no_fd_leaks():
        channel, peer = channel_and_peer(wants_replies=False)
        await channel.send(ConfigChanged())
        assert await channel.result() == 0
        assert peer.recv(100) == wire.message(2)
        channel.close()
        peer.close()


async def test_with_reply_ack_the_result_is_the_front_ends_answer() -> None:
    channel, peer = channel_and_peer(wants_replies=True)
    await channel.send(MISS)
    peer.sendall(wire.reply_to(1, wire.u64(7)))
    assert await channel.result() == 7
    channel.close()
    peer.close()


async def test_a_front_end_that_does_not_read_makes_send_wait_and_nothing_else(autojump_clock: object) -> None:
    channel, peer = channel_and_peer(wants_replies=False)
    with trio.move_on_after(60) as limit:
        while True:
            await channel.send(MISS)
    assert limit.cancelled_caught
    channel.close()
    peer.close()


async def test_the_sockets_flags_are_neither_set_nor_needed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    copy = os.dup(ours.fileno())
    channel = BackendChannel(OwnedFd(ours.detach()), wants_replies=True)
    assert os.get_blocking(copy)  # the description is shared with whoever sent it
    await channel.send(MISS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.result)
        await trio.testing.wait_all_tasks_blocked()
        theirs.sendall(wire.reply_to(1, wire.u64(0)))
    channel.close()
    theirs.close()
    os.close(copy)


async def test_a_front_end_that_closes_the_channel_is_noticed() -> None:
    channel, peer = channel_and_peer(wants_replies=True)
    await channel.send(MISS)
    peer.close()
    with pytest.raises(ConnectionError):
        await channel.result()
    with pytest.raises(BrokenPipeError):
        await channel.send(MISS)
    channel.close()


async def test_closing_wakes_whoever_waits_for_an_answer() -> None:
    channel, peer = channel_and_peer(wants_replies=True)
    await channel.send(MISS)
    woken = trio.Event()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await channel.result()
        woken.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        channel.close()
    assert woken.is_set()
    peer.close()


@pytest.mark.parametrize("kind", ["eventfd", "pipe", "datagram_socket", "inet_socket"])
def test_anything_but_a_unix_stream_socket_is_refused_and_closed(kind: str) -> None:
    with wire.no_fd_leaks():
        if kind == "eventfd":
            fd = wire.eventfd()
        elif kind == "pipe":
            fd, other = os.pipe()
            os.close(other)
        elif kind == "datagram_socket":
            fd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
        else:
            fd = socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
        with pytest.raises(PeerError, match="the file descriptor is no"):
            BackendChannel(OwnedFd(fd), wants_replies=False)
