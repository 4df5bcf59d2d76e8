"""Two guests of one daemon in a group connect to each other (5.10), by streams and by messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from kit.guest.blk import pattern
from kit.guest.vsock import (
    CREDIT_UPDATE,
    REQUEST,
    RST,
    RW,
    SEQPACKET,
    SHUT_BOTH,
    SHUTDOWN,
    STREAM,
    GuestSocket,
    VsockGuest,
    vsock,
)

from virtio.errors import HostError
from virtio.testing import TestDriver, attach


@asynccontextmanager
async def two_guests(folder: Path, *, groups: tuple[str | None, str | None]) -> AsyncIterator[list[VsockGuest]]:
    async with AsyncExitStack() as stack:
        guests = []
        for cid, group in zip((3, 4), groups, strict=True):
            device = vsock(folder, cid=cid, name=f"vsock{cid}", group=group)
            guests.append(VsockGuest(await stack.enter_async_context(attach(device)), cid=cid))
        yield guests


async def joined(one: VsockGuest, other: VsockGuest, type: int) -> tuple[GuestSocket, GuestSocket]:
    """A connection from port 5000 of one to port 80 of the other."""
    sockets: list[GuestSocket] = []

    async def accept() -> None:
        sockets.append(await other.accept(80, type=type))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        asking = await one.connect(5000, 80, type=type, dst_cid=other.cid)
    assert sockets[0].peer_cid == one.cid
    return asking, sockets[0]


async def test_bytes_go_both_ways_between_two_guests(tmp_path: Path) -> None:
    up, down = pattern(1_000_001, 1), pattern(900_001, 2)
    async with two_guests(tmp_path, groups=("lab", "lab")) as (one, other):
        asking, accepting = await joined(one, other, STREAM)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asking.send, up)
            assert await accepting.receive(len(up)) == up
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepting.send, down)
            assert await asking.receive(len(down)) == down


async def test_messages_between_two_guests_stay_whole(tmp_path: Path) -> None:
    async with two_guests(tmp_path, groups=("lab", "lab")) as (one, other):
        asking, accepting = await joined(one, other, SEQPACKET)
        for size in (1, 0, 4096, 70_000, 256 * 1024):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(asking.send, pattern(size, size))
                assert await accepting.receive_message() == pattern(size, size)
        await accepting.send(b"thank you")
        assert await asking.receive_message() == b"thank you"


async def test_the_end_of_one_guest_is_told_to_the_other(tmp_path: Path) -> None:
    async with two_guests(tmp_path, groups=("lab", "lab")) as (one, other):
        asking, accepting = await joined(one, other, STREAM)
        await asking.send(b"bye")
        await asking.say(SHUTDOWN, flags=SHUT_BOTH)
        assert await accepting.receive(3) == b"bye"
        while accepting.shut != SHUT_BOTH:
            assert (await accepting.hear()).op == SHUTDOWN
        while (packet := await asking.hear()).op != RST:
            assert packet.op in (SHUTDOWN, CREDIT_UPDATE)


async def test_a_refusal_of_the_other_guest_comes_back(tmp_path: Path) -> None:
    async with two_guests(tmp_path, groups=("lab", "lab")) as (one, other):
        await one.say(REQUEST, 5000, 80, dst_cid=4)
        asked = await other.hear()
        assert (asked.op, asked.src_cid, asked.src_port, asked.dst_port) == (REQUEST, 3, 5000, 80)
        await other.say(RST, 80, 5000, dst_cid=3)
        refused = await one.hear()
        assert (refused.op, refused.src_cid, refused.src_port) == (RST, 4, 80)


async def test_a_guest_that_gives_up_asking_is_not_connected_later(tmp_path: Path) -> None:
    async with two_guests(tmp_path, groups=("lab", "lab")) as (one, other):
        await one.say(REQUEST, 5000, 80, dst_cid=4)
        assert (await other.hear()).op == REQUEST
        await one.say(RST, 5000, 80, dst_cid=4)
        assert (await other.hear()).meaning == (RST, 5000, 80)
        await one.silence()


async def test_a_guest_that_reboots_leaves_its_peers(tmp_path: Path) -> None:
    async with two_guests(tmp_path, groups=("lab", "lab")) as (one, other):
        _, accepting = await joined(one, other, STREAM)
        assert isinstance(one.driver, TestDriver)
        await one.driver.reset()
        while accepting.shut != SHUT_BOTH:
            assert (await accepting.hear()).op == SHUTDOWN
        one = VsockGuest(one.driver, cid=3)
        await accepting.say(SHUTDOWN, flags=SHUT_BOTH)
        assert (await accepting.hear()).op == RST
        again, _ = await joined(one, other, STREAM)
        assert again.peer_cid == 4


async def test_a_guest_that_never_reads_stops_the_one_that_sends(tmp_path: Path) -> None:
    async with two_guests(tmp_path, groups=("lab", "lab")) as (one, other):
        asking, _ = await joined(one, other, STREAM)
        sent = 0
        while asking.credit > 0:
            piece = bytes(min(asking.credit, 65536))
            asking.sent += len(piece)
            sent += len(piece)
            await asking.say(RW, piece)
            await trio.testing.wait_all_tasks_blocked()
            while asking.guest.driver.queues[0].driver.has_used():
                await asking.hear()
        # The other guest's credit, what our two buffers hold, and what the kernel keeps for the pair of sockets.
        assert sent <= 4 * 256 * 1024 + 1024 * 1024


@pytest.mark.parametrize("groups", [(None, None), ("lab", None), ("lab", "office")], ids=str)
async def test_guests_that_share_no_group_do_not_reach_each_other(
    groups: tuple[str | None, str | None], tmp_path: Path
) -> None:
    async with two_guests(tmp_path, groups=groups) as (one, other):
        await one.say(REQUEST, 5000, 80, dst_cid=4)
        assert (await one.hear()).op == RST
        await other.silence()


async def test_a_guest_of_the_group_that_is_not_there_is_a_reset(tmp_path: Path) -> None:
    async with two_guests(tmp_path, groups=("lab", "lab")) as (one, _):
        for cid in (0, 1, 5, 0xFFFF_FFFF, 1 << 40):
            await one.say(REQUEST, 5000, 80, dst_cid=cid)
            assert (await one.hear()).op == RST


def test_two_guests_of_a_group_cannot_have_one_context_id(tmp_path: Path) -> None:
    first = vsock(tmp_path, cid=5, name="a", group="lab")
    with pytest.raises(HostError, match=r"cid 5 is another guest's of group 'lab'; give each its own"):
        vsock(tmp_path, cid=5, name="b", group="lab")
    elsewhere = vsock(tmp_path, cid=5, name="c", group="office")
    first.close()
    vsock(tmp_path, cid=5, name="d", group="lab").close()
    elsewhere.close()
