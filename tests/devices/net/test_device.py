"""The network device (5.1): what is dropped, what comes back, and lies that harm nobody."""

from __future__ import annotations

import os
import struct

import pytest
import trio
from kit.front_end.frontend import (
    F_VERSION_1,
    NEEDS_RESET,
    Guest,
    Plugged,
    Setting,
    every_native_setting,
    every_reactor,
    plugged,
)
from kit.guest.blk import pattern
from pydantic import ValidationError

from virtio.devices.net.address import mac_from_name
from virtio.devices.net.device import Net, NetOptions
from virtio.fd import OwnedFd
from virtio.native.nic import NicCounters
from virtio.testing.driver import Element, Used
from virtio.waist import Doorbell

RECEIVE, TRANSMIT = 0, 1
F_MRG_RXBUF = 1 << 15
HEADER = bytes(12)
OURS = bytes(10) + b"\1\0"  # num_buffers = 1
GUEST_MAC = bytes.fromhex("025e10000001")
FRAME_MIN = 14
FRAME_MAX = 14 + 8 + 0xFFFF
NOTHING_LOST = NicCounters()


def net(frames: str, mac: str | None = None, mtu: int | None = None) -> Net:
    return Net("lan", NetOptions(frames=frames, mac=mac, mtu=mtu), 1, 256)


def frame(size: int, seed: int = 1) -> bytes:
    return (b"\xff" * 6 + GUEST_MAC + b"\x08\x00" + pattern(size, seed))[:size]


async def send(guest: Guest, data: bytes, header: bytes = HEADER) -> Used:
    return await guest.queues[TRANSMIT].request([header, data] if data else [header], [])


async def received(guest: Guest, count: int = 1) -> list[bytes]:
    """The frames that came in one buffer each, checked to have the device's own header."""
    back = await guest.queues[RECEIVE].used(count)
    found = []
    for used in back:
        whole = b"".join(used.buffers)[: used.written]
        assert whole[:12] == OURS
        found.append(whole[12:])
    return found


def counters(device: object) -> NicCounters:
    assert isinstance(device, Net)
    return device.native_device.counters()


# ---- what it is ----


@every_native_setting
async def test_it_has_a_queue_each_way_and_tells_its_address_mtu_and_that_the_link_is_up(setting: Setting) -> None:
    async with plugged(net("drop", "02:00:5E:10:20:30", 1400), setting) as p:
        assert await p.guest.link.queue_count() == 3  # and one for control
        assert await p.guest.link.read_config(0, 12) == bytes.fromhex("02005e102030 0100 0100 7805")
        own = await p.guest.link.device_features() & 0xFF_FFFF
        # MTU, MAC, MRG_RXBUF, STATUS, CTRL_VQ, GUEST_ANNOUNCE, CTRL_MAC_ADDR: no offload, and nothing to filter
        assert own == 1 << 3 | 1 << 5 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 23


def test_an_address_made_from_the_name_is_always_the_same_and_local_to_us() -> None:
    assert net("drop").mac == mac_from_name("lan") == mac_from_name("lan")
    macs = {mac_from_name(f"net{number}") for number in range(500)}
    assert len(macs) == 500
    assert all(mac[0] & 3 == 2 for mac in macs)


@pytest.mark.parametrize("mac", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "02:00", "2:0:0:0:0:0"])
def test_an_address_that_no_station_can_have_is_refused(mac: str) -> None:
    with pytest.raises(ValidationError):
        NetOptions(mac=mac)


@pytest.mark.parametrize("options", [{"backend": "switch"}, {"switch": "lan"}, {"mtu": 67}])
def test_options_that_do_not_go_together_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NetOptions(**options)


async def test_pulling_the_cable_loses_frames_and_tells_the_driver() -> None:
    async with plugged(net("reflect"), Setting("waist", "split", "io_uring")) as p:
        assert isinstance(p.device, Net)
        p.device.set_link(False)
        await p.guest.link.config_change()
        assert await p.guest.link.read_config(6, 2) == b"\0\0"
        p.guest.queues[RECEIVE].driver.add([], [1526])
        await send(p.guest, frame(60, 1))
        assert counters(p.device) == NicCounters(sent_link_down=1)
        assert p.device.set_link(True)
        assert not p.device.set_link(True)
        await p.guest.link.config_change()
        assert await p.guest.link.read_config(6, 2) == b"\3\0"  # up, and: announce yourself
        await send(p.guest, frame(60, 2))
        assert await received(p.guest) == [frame(60, 2)]


# ---- drop ----


@every_native_setting
async def test_what_is_dropped_was_sent_all_the_same(setting: Setting) -> None:
    async with plugged(net("drop"), setting) as p:
        p.guest.queues[RECEIVE].driver.add([], [1526])
        for size in (FRAME_MIN, 60, 1514):
            assert (await send(p.guest, frame(size))).written == 0
        assert p.op("transmit", TRANSMIT) == (3, 0)
        assert p.guest.queues[RECEIVE].driver.used() == []
        assert counters(p.device).dropped == 3


# ---- reflect ----


@every_native_setting
@pytest.mark.parametrize("without", [0, F_MRG_RXBUF], ids=["mergeable", "whole"])
async def test_every_frame_comes_back_byte_for_byte(setting: Setting, without: int) -> None:
    sizes = [FRAME_MIN, 60, 61, 1514, 4000, FRAME_MAX]
    async with plugged(net("reflect"), setting, without=without) as p:
        for number, size in enumerate(sizes):
            p.guest.queues[RECEIVE].driver.add([], [7, 12, size])
            await send(p.guest, frame(size, number))
            assert await received(p.guest) == [frame(size, number)]
        assert p.op("transmit", TRANSMIT) == (len(sizes), 0)
        assert p.op("receive", RECEIVE) == (len(sizes), 0)
        assert counters(p.device) == NOTHING_LOST


@every_reactor
async def test_no_frame_is_lost_while_doorbells_come_and_go(setting: Setting) -> None:
    changes = 0

    async def change(p: Plugged) -> None:
        nonlocal changes
        while True:
            for queue in (RECEIVE, TRANSMIT):
                await p.backend.set_doorbell(queue, Doorbell.HYPERCALL, OwnedFd(os.eventfd(0, os.EFD_NONBLOCK)))
                await p.backend.set_doorbell(queue, Doorbell.HYPERCALL, None)
                changes += 1
            await trio.lowlevel.checkpoint()

    async with plugged(net("reflect"), setting) as p:
        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change, p)
                while changes < 300:
                    p.guest.queues[RECEIVE].driver.add([], [1526])
                    seed = changes
                    await send(p.guest, frame(60, seed))
                    assert counters(p.device) == NOTHING_LOST
                    assert await received(p.guest) == [frame(60, seed)]
                    await trio.lowlevel.checkpoint()  # the answer may have been there at once: changes go on
                nursery.cancel_scope.cancel()


@every_native_setting
async def test_a_frame_larger_than_a_buffer_is_spread_over_as_many_as_it_takes(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        ring = p.guest.queues[RECEIVE]
        for sizes in ([12], [5, 7, 100], [500], [1000], [1000]):
            ring.driver.add([], sizes)
        await send(p.guest, frame(1400))
        back = await ring.used(4)
        parts = [b"".join(used.buffers)[: used.written] for used in back]
        assert [len(part) for part in parts] == [12, 112, 500, 788]
        assert parts[0] == bytes(10) + b"\4\0"
        assert b"".join(parts[1:]) == frame(1400)
        await send(p.guest, frame(60))
        assert await received(p.guest) == [frame(60)]


@every_native_setting
async def test_a_frame_too_large_for_the_buffers_at_hand_takes_none_of_them(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        ring = p.guest.queues[RECEIVE]
        for _ in range(3):
            ring.driver.add([], [112])
        await send(p.guest, frame(400))
        assert counters(p.device).no_buffers == 1
        for number in range(3):
            await send(p.guest, frame(100, number))
        assert await received(p.guest, 3) == [frame(100, number) for number in range(3)]


@every_native_setting
async def test_without_mergeable_buffers_a_frame_too_large_for_one_is_lost_alone(setting: Setting) -> None:
    async with plugged(net("reflect"), setting, without=F_MRG_RXBUF) as p:
        p.guest.queues[RECEIVE].driver.add([], [12 + 59])
        p.guest.queues[RECEIVE].driver.add([], [12 + 60])
        await send(p.guest, frame(60))
        assert counters(p.device).refused == 1
        await send(p.guest, frame(59))
        assert await received(p.guest) == [frame(59)]
        await send(p.guest, frame(60))
        assert await received(p.guest) == [frame(60)]


@every_native_setting
async def test_a_burst_comes_back_in_order(setting: Setting) -> None:
    async with plugged(net("reflect"), setting, queue_size=256) as p:
        count = 94
        for _ in range(count):
            p.guest.queues[RECEIVE].driver.add([], [200])
        for number in range(count):
            p.guest.queues[TRANSMIT].driver.add([HEADER + frame(100, number)], [])
        p.guest.queues[TRANSMIT].kick()
        await p.guest.queues[TRANSMIT].used(count)
        assert await received(p.guest, count) == [frame(100, number) for number in range(count)]


@every_native_setting
async def test_frames_without_a_buffer_are_counted_and_the_next_one_comes(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        for _ in range(3):
            await send(p.guest, frame(60, 1))
        assert counters(p.device).no_buffers == 3
        p.guest.queues[RECEIVE].driver.add([], [100])
        await send(p.guest, frame(60, 2))
        assert await received(p.guest) == [frame(60, 2)]


@every_native_setting
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


@every_native_setting
async def test_a_driver_of_old_gets_the_header_of_old(setting: Setting) -> None:
    """5.1.6.1: a legacy header has no num_buffers."""
    async with plugged(net("reflect"), setting, without=F_VERSION_1 | F_MRG_RXBUF) as p:
        p.guest.queues[RECEIVE].driver.add([], [70])
        await send(p.guest, frame(60), bytes(10))
        (used,) = await p.guest.queues[RECEIVE].used()
        assert (used.written, used.buffers[0]) == (70, bytes(10) + frame(60))


# ---- a disabled transmit queue (vhost-user, "Ring states") ----


@every_native_setting
async def test_what_is_sent_on_a_disabled_queue_is_taken_counted_and_never_comes(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        for _ in range(4):
            p.guest.queues[RECEIVE].driver.add([], [1526])
        await send(p.guest, frame(60, 1))
        await p.guest.link.enable(TRANSMIT, False)
        for seed in (2, 3, 4):
            assert (await send(p.guest, frame(60, seed))).written == 0
        assert counters(p.device) == NicCounters(sent_disabled=3)
        assert p.op("transmit", TRANSMIT) == (4, 3)
        await p.guest.link.enable(TRANSMIT, True)
        await send(p.guest, frame(60, 5))
        assert await received(p.guest, 2) == [frame(60, 1), frame(60, 5)]
        assert counters(p.device) == NicCounters(sent_disabled=3)


@every_native_setting
async def test_lies_on_a_disabled_queue_are_still_lies(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        await p.guest.link.enable(TRANSMIT, False)
        await send(p.guest, b"")
        await send(p.guest, frame(60))
        assert counters(p.device) == NicCounters(malformed=1, sent_disabled=1)
        ring = p.guest.queues[TRANSMIT]
        ring.driver.add_elements([Element(1 << 40, 100, False)])  # outside memory
        ring.kick()
        await ring.broken()
        assert await p.guest.link.stop(TRANSMIT) is not None


@every_native_setting
async def test_a_disabled_queue_that_is_not_kicked_is_not_looked_at(setting: Setting) -> None:
    """The memory of its ring may be used for something else by now: User-mode Linux unbinds a driver like that."""
    async with plugged(net("reflect"), setting) as p:
        ring = p.guest.queues[TRANSMIT]
        await send(p.guest, frame(60))
        await p.guest.link.enable(TRANSMIT, False)
        assert (await send(p.guest, frame(60))).written == 0
        size = ring.driver.area_sizes[1]
        kept = p.guest.memory.read(ring.driver.avail, size)
        for content in (bytes(size), b"\xa5" * size):
            p.guest.memory.write(ring.driver.avail, content)
            p.guest.queues[RECEIVE].ring()  # its worker looks at what it has
            await p.guest.link.share(p.guest.memory)
            assert not await p.guest.link.status() & NEEDS_RESET
        p.guest.memory.write(ring.driver.avail, kept)
        await p.guest.link.enable(TRANSMIT, True)
        p.guest.queues[RECEIVE].driver.add([], [1526])
        await send(p.guest, frame(60, 5))
        assert (await received(p.guest, 1))[-1] == frame(60, 5)


@every_native_setting
async def test_a_disabled_queue_stops_and_starts_like_any_other_and_waits_to_be_enabled(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        p.guest.queues[RECEIVE].driver.add([], [1526])
        await p.guest.link.enable(TRANSMIT, False)
        await send(p.guest, frame(60, 1))
        base = await p.guest.link.stop(TRANSMIT)
        ring = p.guest.queues[TRANSMIT]
        await p.guest.link.set_up(TRANSMIT, ring.driver.size, ring.areas, base)
        await p.guest.link.set_call(TRANSMIT, ring.call_fd)
        ring.driver.add([HEADER, frame(60, 2)], [])
        ring.ring()
        await p.guest.link.set_kick(TRANSMIT, ring.kick_fd)
        await p.guest.link.enable(TRANSMIT, True)
        await ring.used()
        assert await received(p.guest) == [frame(60, 2)]
        assert counters(p.device) == NicCounters(sent_disabled=1)


@every_native_setting
async def test_a_new_driver_is_not_silenced_by_what_the_last_one_had_disabled(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        await p.guest.link.enable(TRANSMIT, False)
        await p.guest.link.reset()
        p.guest.forget_queues()
        await p.guest.start()
        p.guest.queues[RECEIVE].driver.add([], [72])
        await send(p.guest, frame(60))
        assert await received(p.guest) == [frame(60)]


@every_reactor
async def test_a_queue_disabled_under_load_lets_nothing_through_after_the_answer(setting: Setting) -> None:
    async with plugged(net("reflect"), setting, queue_size=256) as p:
        frames = p.guest.queues[RECEIVE], p.guest.queues[TRANSMIT]
        for round_number in range(50):
            for _ in range(60):
                frames[1].driver.add([HEADER, frame(60)], [])
            frames[1].kick()
            await p.guest.link.enable(TRANSMIT, False)
            lost = counters(p.device).no_buffers  # those that came back, before it was disabled
            await frames[1].used(60)
            assert counters(p.device).no_buffers == lost
            assert lost + counters(p.device).sent_disabled == 60 * (round_number + 1)
            await p.guest.link.enable(TRANSMIT, True)


# ---- lies ----


@every_native_setting
@pytest.mark.parametrize("pieces", [[b"x"], [HEADER], [HEADER[:11]], [HEADER, b"x" * 13], [b"x"] * 25], ids=len)
async def test_a_runt_is_dropped_and_counted(setting: Setting, pieces: list[bytes]) -> None:
    async with plugged(net("reflect"), setting) as p:
        p.guest.queues[RECEIVE].driver.add([], [1526])
        for _ in range(2):
            used = await p.guest.queues[TRANSMIT].request(pieces, [])
            assert used.written == 0
        assert p.op("transmit", TRANSMIT) == (2, 2)
        assert counters(p.device).malformed == 2
        await send(p.guest, frame(60))
        assert await received(p.guest) == [frame(60)]


@every_native_setting
@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0),  # a checksum, which was not offered
        struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0),  # segmentation, neither
        struct.pack("<BBHHHHH", 0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
    ],
    ids=["csum", "gso", "all"],
)
async def test_an_offload_that_was_not_negotiated_costs_that_frame_alone(setting: Setting, header: bytes) -> None:
    async with plugged(net("reflect"), setting) as p:
        p.guest.queues[RECEIVE].driver.add([], [1526])
        await send(p.guest, frame(60, 1), header)
        assert counters(p.device).malformed == 1
        await send(p.guest, frame(60, 2))
        assert await received(p.guest) == [frame(60, 2)]
        assert not await p.guest.link.status() & NEEDS_RESET


@every_native_setting
async def test_a_frame_longer_than_any_is_dropped_and_counted(setting: Setting) -> None:
    async with plugged(net("reflect"), setting) as p:
        p.guest.queues[RECEIVE].driver.add([], [3 * FRAME_MAX])
        await send(p.guest, frame(FRAME_MAX + 1))
        await send(p.guest, frame(2 * FRAME_MAX))
        assert p.op("transmit", TRANSMIT) == (2, 2)
        await send(p.guest, frame(60))
        assert await received(p.guest) == [frame(60)]


@every_native_setting
@pytest.mark.parametrize("buffer", [([b"x" * 100], []), ([], [11])], ids=["readable", "no-room-for-a-header"])
async def test_a_receive_buffer_that_is_none_breaks_the_receive_queue_and_no_other(
    setting: Setting, buffer: tuple[list[bytes], list[int]]
) -> None:
    async with plugged(net("reflect"), setting) as p:
        p.guest.queues[RECEIVE].driver.add(*buffer)
        await send(p.guest, frame(60))
        await p.guest.queues[RECEIVE].broken()
        await send(p.guest, frame(60))
        assert p.op("transmit", TRANSMIT) == (2, 0)
