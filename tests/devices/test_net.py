"""The network device (5.1) without a network: what is sent is dropped or comes back, and lies harm nobody."""

from __future__ import annotations

import struct

import pytest
from blk_driver import pattern
from driver import Used
from frontend import F_VERSION_1, NEEDS_RESET, Guest, Setting, every_python_setting, plugged
from pydantic import ValidationError
from structlog.testing import capture_logs

from virtio.devices.net import BACKLOG, FRAME_MAX, FRAME_MIN, Net, NetOptions, mac_from_name
from virtio.pump import BATCH

RECEIVE, TRANSMIT = 0, 1
HEADER = bytes(12)
OURS = bytes(10) + b"\1\0"  # num_buffers = 1
GUEST_MAC = bytes.fromhex("025e10000001")


def net(mode: str, mac: str | None = None) -> Net:
    return Net("lan", NetOptions(frames=mode, mac=mac), 1, 256)  # type: ignore[arg-type]


def frame(size: int, seed: int = 1) -> bytes:
    return (b"\xff" * 6 + GUEST_MAC + b"\x08\x00" + pattern(size, seed))[:size]


async def send(guest: Guest, data: bytes, header: bytes = HEADER) -> Used:
    return await guest.queues[TRANSMIT].request([header, data] if data else [header], [])


async def received(guest: Guest, count: int = 1) -> list[bytes]:
    """The frames that came, each checked to have the device's own header."""
    back = await guest.queues[RECEIVE].used(count)
    found = []
    for used in back:
        whole = b"".join(used.buffers)[: used.written]
        assert whole[:12] == OURS
        found.append(whole[12:])
    return found


async def both_queues_run(guest: Guest) -> None:
    """They start in any order, and what is sent before the receive queue runs waits for it."""
    guest.queues[RECEIVE].driver.add([], [72])
    await send(guest, frame(60))
    assert await received(guest) == [frame(60)]


# ---- what it is ----


@every_python_setting
async def test_it_has_a_queue_each_way_and_tells_its_address_and_that_the_link_is_up(setting: Setting) -> None:
    async with plugged(net("drop", "02:00:5E:10:20:30"), setting) as p:
        assert await p.guest.link.queue_count() == 2
        assert await p.guest.link.read_config(0, 8) == bytes.fromhex("02005e1020300100")
        own = await p.guest.link.device_features() & 0xFF_FFFF
        assert own == 1 << 5 | 1 << 16  # MAC, STATUS, and not one offload


def test_an_address_made_from_the_name_is_always_the_same_and_local_to_us() -> None:
    assert net("drop").mac == mac_from_name("lan") == mac_from_name("lan")
    macs = {mac_from_name(f"net{number}") for number in range(500)}
    assert len(macs) == 500
    assert all(mac[0] & 3 == 2 for mac in macs)


@pytest.mark.parametrize("mac", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "02:00", "2:0:0:0:0:0"])
def test_an_address_that_no_station_can_have_is_refused(mac: str) -> None:
    with pytest.raises(ValidationError):
        NetOptions(mac=mac)


# ---- drop ----


@every_python_setting
async def test_what_is_dropped_was_sent_all_the_same(setting: Setting) -> None:
    async with plugged(net("drop"), setting) as p:
        p.guest.queues[RECEIVE].driver.add([], [1526])
        for size in (FRAME_MIN, 60, 1514):
            assert (await send(p.guest, frame(size))).written == 0
        assert p.op("transmit", TRANSMIT) == (3, 0)
        assert p.guest.queues[RECEIVE].driver.used() == []


# ---- reflect ----


@every_python_setting
async def test_every_frame_comes_back_byte_for_byte(setting: Setting) -> None:
    sizes = [FRAME_MIN, 60, 61, 1514, 4000, FRAME_MAX]
    async with plugged(net("reflect"), setting) as p:
        for number, size in enumerate(sizes):
            p.guest.queues[RECEIVE].driver.add([], [7, 12, size])
            await send(p.guest, frame(size, number))
            assert await received(p.guest) == [frame(size, number)]
        assert p.op("transmit", TRANSMIT) == (len(sizes), 0)
        assert p.op("receive", RECEIVE) == (len(sizes), 0)


@every_python_setting
async def test_a_burst_comes_back_in_order(setting: Setting) -> None:
    async with plugged(net("reflect"), setting, queue_size=256) as p:
        count = BATCH + 30
        for _ in range(count):
            p.guest.queues[RECEIVE].driver.add([], [200])
        for number in range(count):
            p.guest.queues[TRANSMIT].driver.add([HEADER + frame(100, number)], [])
        p.guest.queues[TRANSMIT].kick()
        await p.guest.queues[TRANSMIT].used(count)
        assert await received(p.guest, count) == [frame(100, number) for number in range(count)]


@every_python_setting
async def test_a_frame_without_a_buffer_is_dropped_and_counted_and_the_next_one_comes(setting: Setting) -> None:
    with capture_logs() as logs:
        async with plugged(net("reflect"), setting) as p:
            await both_queues_run(p.guest)
            for _ in range(3):
                await send(p.guest, frame(60, 1))
            assert p.op("transmit", TRANSMIT) == (4, 3)
            p.guest.queues[RECEIVE].driver.add([], [100])
            await send(p.guest, frame(60, 2))
            assert await received(p.guest) == [frame(60, 2)]
            assert p.op("transmit", TRANSMIT) == (5, 3)
    told = [line["event"] for line in logs if "dropped" in line["event"]]
    assert told == ["a frame was dropped: the driver gave no buffer for it"]


@every_python_setting
async def test_a_buffer_too_small_comes_back_empty_and_the_frame_counts_as_lost(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        await both_queues_run(p.guest)
        ring = p.guest.queues[RECEIVE]
        ring.driver.add([], [12 + 59])
        await send(p.guest, frame(60))
        (used,) = await ring.used()
        assert used.written == 0
        assert p.op("receive", RECEIVE) == (2, 1)
        assert p.op("transmit", TRANSMIT) == (2, 1)
        ring.driver.add([], [12 + 60])
        await send(p.guest, frame(60))
        assert await received(p.guest) == [frame(60)]


@every_python_setting
async def test_frames_wait_for_a_receive_queue_that_is_stopped_for_a_moment(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        await p.guest.link.enable(RECEIVE, False)
        for number in range(BACKLOG + 2):
            await send(p.guest, frame(60, number))
        assert p.op("transmit", TRANSMIT) == (BACKLOG + 2, 2)
        for _ in range(BACKLOG // 2):
            p.guest.queues[RECEIVE].driver.add([], [72])
        await p.guest.link.enable(RECEIVE, True)
        assert await received(p.guest, BACKLOG // 2) == [frame(60, number) for number in range(BACKLOG // 2)]


@every_python_setting
async def test_no_frame_of_one_driver_reaches_the_next(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        await p.guest.link.enable(RECEIVE, False)
        await send(p.guest, frame(60, 1))
        await p.guest.link.reset()
        p.guest.forget_queues()
        await p.guest.start()
        p.guest.queues[RECEIVE].driver.add([], [72])
        await send(p.guest, frame(60, 2))
        assert await received(p.guest) == [frame(60, 2)]


@every_python_setting
async def test_a_driver_of_old_gets_the_header_of_old(setting: Setting) -> None:
    """5.1.6.1: a legacy header has no num_buffers."""
    async with plugged(net("reflect"), setting, without=F_VERSION_1) as p:
        p.guest.queues[RECEIVE].driver.add([], [70])
        await send(p.guest, frame(60), bytes(10))
        (used,) = await p.guest.queues[RECEIVE].used()
        assert (used.written, used.buffers[0]) == (70, bytes(10) + frame(60))


# ---- lies ----


@every_python_setting
@pytest.mark.parametrize("pieces", [[b"x"], [HEADER], [HEADER[:11]], [HEADER, b"x" * 13], [b"x"] * 25], ids=len)
async def test_a_runt_is_dropped_and_counted(setting: Setting, pieces: list[bytes]) -> None:
    with capture_logs() as logs:
        async with plugged(net("reflect"), setting) as p:
            p.guest.queues[RECEIVE].driver.add([], [1526])
            for _ in range(2):
                used = await p.guest.queues[TRANSMIT].request(pieces, [])
                assert used.written == 0
            assert p.op("transmit", TRANSMIT) == (2, 2)
            await send(p.guest, frame(60))
            assert await received(p.guest) == [frame(60)]
    assert len([line for line in logs if "shorter" in line["event"]]) == 1


@every_python_setting
@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<BBHHHHH", 1, 0, 0, 0, 0xFFFF, 0xFFFF, 0),  # a checksum beyond the packet
        struct.pack("<BBHHHHH", 0, 1, 0xFFFF, 0, 0, 0, 0),  # segments of no bytes
        struct.pack("<BBHHHHH", 0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
    ],
    ids=["csum", "gso", "all"],
)
async def test_a_header_that_lies_is_not_believed_and_not_passed_on(setting: Setting, header: bytes) -> None:
    async with plugged(net("reflect"), setting) as p:
        p.guest.queues[RECEIVE].driver.add([], [1526])
        await send(p.guest, frame(60), header)
        assert await received(p.guest) == [frame(60)]
        assert not await p.guest.link.status() & NEEDS_RESET


@every_python_setting
async def test_a_frame_longer_than_any_is_dropped_and_counted(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        p.guest.queues[RECEIVE].driver.add([], [3 * FRAME_MAX])
        await send(p.guest, frame(FRAME_MAX + 1))
        await send(p.guest, frame(2 * FRAME_MAX))
        assert p.op("transmit", TRANSMIT) == (2, 2)
        await send(p.guest, frame(60))
        assert await received(p.guest) == [frame(60)]


@every_python_setting
async def test_buffers_that_point_the_wrong_way_count_for_nothing(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        await both_queues_run(p.guest)
        used = await p.guest.queues[TRANSMIT].request([], [100])  # nothing to send
        assert used.written == 0
        p.guest.queues[RECEIVE].driver.add([b"x" * 100], [])  # no room
        await send(p.guest, frame(60))
        (used,) = await p.guest.queues[RECEIVE].used()
        assert used.written == 0
        assert p.op("transmit", TRANSMIT) == (3, 2)
