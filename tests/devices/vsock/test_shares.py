"""A guest of a group takes its share of the connections of another one, and leaves some to the host and to a third."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from kit.guest.vsock import REQUEST, RESPONSE, RST, VsockGuest, vsock
from structlog.testing import capture_logs

from virtio.clients import shortages
from virtio.devices.vsock.options import OF_A_CONNECTION, OF_OTHERS
from virtio.devices.vsock.shares import CONNECTION, Shares
from virtio.testing import attach
from virtio.testing.queue import GUARD

PLACES = 16


@asynccontextmanager
async def guests_of_a_group(folder: Path, count: int) -> AsyncIterator[list[VsockGuest]]:
    async with AsyncExitStack() as stack:
        guests = []
        for cid in range(3, 3 + count):
            device = vsock(folder, cid=cid, name=f"vsock{cid}", group="lab", connections=PLACES if cid == 4 else 512)
            guests.append(VsockGuest(await stack.enter_async_context(attach(device)), cid=cid, buffers=60))
        yield guests


async def fill(asking: VsockGuest, target: VsockGuest, *, answers: bool) -> int:
    """Ask for more connections than there are places; how many requests came to the target."""
    for port in range(PLACES + 8):
        await asking.say(REQUEST, 5000 + port, 80, dst_cid=target.cid)
    await trio.testing.wait_all_tasks_blocked()
    came = 0
    for used in target.driver.queues[0].driver.used():
        packet = used.buffers[0]
        assert int.from_bytes(packet[:8], "little") == asking.cid
        came += 1
        if answers:
            await target.say(RESPONSE, 80, int.from_bytes(packet[16:20], "little"), dst_cid=asking.cid)
    target.post(came)
    return came


async def accept(guest: VsockGuest, port: int) -> None:
    """Accept the next connection to ``port``, whatever else is said meanwhile."""
    while True:
        asked = await guest.hear()
        if (asked.op, asked.dst_port) == (REQUEST, port):
            await guest.say(RESPONSE, port, asked.src_port, dst_cid=asked.src_cid)
            return


async def host_reaches(folder: Path, guest: VsockGuest, port: int = 22) -> bool:
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        await client.connect(str(folder / f"vsock{guest.cid}"))
        await client.send(b"CONNECT %d\n" % port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, guest, port)
            answer = await client.recv(64)
            nursery.cancel_scope.cancel()
        return answer.startswith(b"OK ")


@pytest.mark.parametrize("answers", [True, False], ids=["accepted", "unanswered"])
async def test_a_guest_that_asks_without_end_leaves_places_for_the_host_and_for_a_third_guest(
    tmp_path: Path, answers: bool
) -> None:
    async with guests_of_a_group(tmp_path, 3) as (greedy, target, third):
        with trio.fail_after(GUARD), capture_logs() as logs:
            assert 0 < await fill(greedy, target, answers=answers) <= PLACES // 2
            assert await host_reaches(tmp_path, target)
            await third.say(REQUEST, 6000, 81, dst_cid=target.cid)
            await accept(target, 81)
            assert (await third.hear()).op == RESPONSE
        told = [line for line in logs if "has its share" in line["event"]]
        assert [(line["device"], line["peer_cid"]) for line in told] == [("vsock4", 3)]


async def test_places_come_back_when_the_connections_end(tmp_path: Path) -> None:
    async with guests_of_a_group(tmp_path, 2) as (greedy, target):
        counts = []
        for _ in range(3):
            counts.append(await fill(greedy, target, answers=True))
            await trio.testing.wait_all_tasks_blocked()
            greedy.clear()
            for port in range(PLACES + 8):
                await greedy.say(RST, 5000 + port, 80, dst_cid=target.cid)
            await trio.testing.wait_all_tasks_blocked()
            target.clear()
            for port in range(PLACES + 8):
                await target.say(RST, 80, 5000 + port, dst_cid=greedy.cid)
            await trio.testing.wait_all_tasks_blocked()
            target.clear()
            greedy.clear()
        assert counts[0] > 0
        assert counts == [counts[0]] * 3


async def test_a_guest_alone_with_its_host_has_all_its_places(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path, cid=4, name="vsock4", connections=PLACES)) as driver:
        guest = VsockGuest(driver, cid=4, buffers=60)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(str(tmp_path / "vsock4_80"))
            server.listen(64)
            for port in range(PLACES):
                await guest.connect(5000 + port, 80)
            await guest.say(REQUEST, 7000, 80)
            assert (await guest.hear()).op == RST


ASKS = st.lists(st.tuples(st.integers(2, 9), st.booleans()), max_size=300)


@given(limit=st.integers(1, 64), asks=ASKS)
def test_however_guests_ask_the_host_finds_a_place_unless_it_and_the_guest_have_taken_them(
    limit: int, asks: list[tuple[int, bool]]
) -> None:
    shares, taken = Shares(limit, 3), dict.fromkeys(range(2, 10), 0)
    for cid, gives_back in asks:
        if gives_back and taken[cid]:
            shares.give_back(cid)
            taken[cid] -= 1
        elif not gives_back and shares.take(cid):
            taken[cid] += 1
        assert sum(taken.values()) <= limit
    others = sum(count for cid, count in taken.items() if cid > 3)
    assert others <= limit - limit // 8
    room = limit - sum(taken.values())
    for _ in range(room):
        assert shares.take(2)
    assert not shares.take(2)


@pytest.mark.parametrize("guests", range(1, 6))
def test_each_of_several_greedy_guests_gets_something(guests: int) -> None:
    shares = Shares(512, 3)
    for cid in range(4, 4 + guests):
        assert shares.take(cid)
        while shares.take(cid):
            pass
    assert shares.take(100), "and one that comes later, too"


async def test_a_guest_has_no_more_connections_than_its_share_of_the_descriptors(tmp_path: Path) -> None:
    """So a guest that asks for all leaves the process what others were promised; one line and one metric say it."""
    device = vsock(tmp_path, connections=512)
    device.limit_descriptors(OF_OTHERS + 3 * OF_A_CONNECTION)
    before = shortages[CONNECTION]
    with socket.socket(socket.AF_UNIX) as host, capture_logs() as logs:
        host.bind(str(tmp_path / "vsock_80"))
        host.listen(16)
        async with attach(device) as plugged:
            guest = VsockGuest(plugged, buffers=60)
            with trio.fail_after(GUARD):
                for port in range(5):
                    await guest.say(REQUEST, 5000 + port, 80)
                heard = [await guest.hear() for _ in range(5)]
    assert [packet.op for packet in heard].count(RESPONSE) == 3
    assert [packet.op for packet in heard].count(RST) == 2
    (line,) = [line for line in logs if "too few descriptors" in line["event"]]
    assert (line["device"], "LimitNOFILE=" in line["remedy"]) == (device.name, True)
    assert shortages[CONNECTION] == before + 2
