"""A switch between guests: who gets a frame, and what is done for a guest that did not offer to do it itself."""

from __future__ import annotations

import struct

import pytest
from kit.front_end.frontend import REACTORS, RINGS
from kit.guest.blk import pattern
from kit.net.lan import BROADCAST, PLAIN, TRANSMIT, lan
from kit.net.packets import GSO, KINDS, LIES, check_sums, packet

F_CSUM, F_GUEST_CSUM, F_MRG_RXBUF = 1 << 0, 1 << 1, 1 << 15
F_GUEST_TSO = 1 << 7 | 1 << 8
F_GUEST_USO = 1 << 54 | 1 << 55
GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO | F_GUEST_USO | 1 << 9

every_switch = pytest.mark.parametrize(("reactor", "ring"), [(r, f) for r in REACTORS for f in RINGS])


# ---- who gets it ----


@every_switch
async def test_a_frame_for_a_station_that_spoke_goes_to_it_alone(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0, 0) as (one, two, three):
        for station in (one, two, three):
            station.listen()
        await two.send(BROADCAST, b"hello")
        for station in (one, three):
            assert await station.frames() == [(bytes(10) + b"\1\0", BROADCAST + two.mac + b"hello")]
        await one.send(two.mac, b"to you")
        assert (await two.frames())[0][1] == two.mac + one.mac + b"to you"
        await two.send(one.mac, b"and back")
        assert (await one.frames())[0][1] == one.mac + two.mac + b"and back"
        assert three.heard_nothing()


@every_switch
async def test_a_frame_for_nobody_known_and_one_for_a_group_go_to_all_others(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0, 0) as (one, two, three):
        for to in (bytes.fromhex("02aabbccddee"), bytes.fromhex("01005e000001")):
            for station in (one, two, three):
                station.listen(1)
            await one.send(to, b"??")
            for station in (two, three):
                assert (await station.frames())[0][1] == to + one.mac + b"??"
            assert one.heard_nothing()
        assert one.device.native_device.counters().flooded == 2


@every_switch
async def test_a_station_is_never_given_its_own_frame(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0) as (one, two):
        one.listen()
        two.listen()
        await one.send(one.mac, b"to myself")
        await one.send(one.mac, b"again")
        await one.send(two.mac, b"last")
        assert (await two.frames())[0][1].endswith(b"last")
        assert one.heard_nothing()


@every_switch
async def test_a_station_that_left_is_forgotten(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0, 0) as (one, two, three):
        for station in (one, two, three):
            station.listen()
        await two.send(BROADCAST, b"here I am")
        await one.frames()
        await three.frames()
        await two.guest.link.reset()
        await one.send(two.mac, b"are you there?")
        assert (await three.frames())[0][1].endswith(b"there?")  # not known any more: everybody is asked


@every_switch
async def test_a_guest_that_makes_up_addresses_by_the_thousand_harms_nobody(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0) as (one, two):
        queue = one.guest.queues[TRANSMIT]
        for first in range(0, 4096, 32):
            for number in range(first, first + 32):
                queue.driver.add([PLAIN + two.mac + b"\2\0" + struct.pack(">I", number) + b"flood"], [])
            queue.kick()
            await queue.used(32)
        one.listen()
        two.listen()
        await two.send(BROADCAST, b"hello")
        await one.frames()
        await one.send(two.mac, b"fine")
        assert (await two.frames())[0][1].endswith(b"fine")


# ---- what the receiver does not do itself ----


@every_switch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 777])
async def test_a_checksum_is_completed_for_a_guest_that_does_not_do_it(
    reactor: str, ring: str, kind: str, size: int
) -> None:
    async with lan(reactor, ring, 0, GUEST_OFFLOADS) as (one, two):
        two.listen()
        body, start, offset = packet(kind, pattern(size, 3))
        await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, 0, 0, 0, start, offset, 0))
        ((header, frame),) = await two.frames()
        assert header == bytes(10) + b"\1\0"
        assert check_sums(frame) == pattern(size, 3)


@every_switch
async def test_an_unfinished_checksum_is_passed_on_to_a_guest_that_offered_to_do_it(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0) as (one, two):
        two.listen()
        body, start, offset = packet("tcp4", b"data")
        await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, 0, 99, 0, start, offset, 77))
        ((header, frame),) = await two.frames()
        assert struct.unpack("<BBHHHHH", header) == (1, 0, 0, 0, start, offset, 1)
        assert frame == BROADCAST + one.mac + body


@every_switch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vlan", [False, True], ids=["", "vlan"])
async def test_a_large_packet_is_cut_for_a_guest_that_takes_none(
    reactor: str, ring: str, kind: str, vlan: bool
) -> None:
    payload = pattern(5000, 9)
    async with lan(reactor, ring, 0, GUEST_OFFLOADS) as (one, two):
        two.listen(16)
        body, start, offset = packet(kind, payload, vlan=vlan)
        await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, GSO[kind], 0, 1400, start, offset, 0))
        frames = [frame for _, frame in await two.frames(4)]
        assert [len(check_sums(frame)) for frame in frames] == [1400, 1400, 1400, 800]
        assert b"".join(check_sums(frame) for frame in frames) == payload
        if "tcp" in kind:
            headers = [struct.unpack_from(">4xI5xB", frame, start) for frame in frames]
            assert [sequence for sequence, _ in headers] == [5000, 6400, 7800, 9200]
            # CWR in the first only, PSH and FIN in the last only.
            assert [flags for _, flags in headers] == [0x90, 0x10, 0x10, 0x19]
        if "4" in kind:
            identities = [struct.unpack_from(">4xH", frame, start - 20)[0] for frame in frames]
            assert identities == [7, 8, 9, 10]


@every_switch
@pytest.mark.parametrize("kind", KINDS)
async def test_a_large_packet_is_passed_on_whole_to_a_guest_that_takes_it(reactor: str, ring: str, kind: str) -> None:
    payload = pattern(9000, 9)
    async with lan(reactor, ring, 0, 0) as (one, two):
        two.listen(16)
        body, start, offset = packet(kind, payload)
        await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, GSO[kind], 0, 1400, start, offset, 0))
        ((header, frame),) = await two.frames()
        headers = start + (8 if "udp" in kind else 20)  # 5.1.6.4.1
        assert struct.unpack("<BBHHHHH", header)[:6] == (1, GSO[kind], headers, 1400, start, offset)
        assert frame == BROADCAST + one.mac + body


@every_switch
@pytest.mark.parametrize(("lie", "seen_by"), LIES, ids=str)
async def test_a_header_that_lies_costs_nobody_but_its_frame(
    reactor: str, ring: str, lie: tuple[int, int, int, int, int, int, int], seen_by: str
) -> None:
    async with lan(reactor, ring, 0, GUEST_OFFLOADS) as (one, two):
        body, _, _ = packet("tcp4", pattern(1300, 5))
        await one.send(BROADCAST, body, struct.pack("<BBHHHHH", *lie))
        lost = one.device.native_device.counters().malformed, two.device.native_device.counters().misreceived
        assert lost == (int(seen_by == "sender"), int(seen_by == "receiver"))
        assert two.device.native_device.counters().no_buffers == int(seen_by == "nobody")
        two.listen(2)
        # Nothing of it, whatever it was, is in the way of what comes after.
        body, start, offset = packet("udp4", b"honest")
        await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, 0, 0, 0, start, offset, 0))
        ((_, frame),) = await two.frames()
        assert check_sums(frame) == b"honest"


@every_switch
async def test_a_checksum_may_end_with_the_frame_and_not_a_byte_later(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, GUEST_OFFLOADS) as (one, two):
        two.listen(4)
        size = 12 + len(body := b"\x88\xb5" + pattern(50, 1))
        for start, offset in ((14, size - 15), (size - 1, 0), (size, 0), (0xFFFF, 0)):
            await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, 0, 0, 0, start, offset, 0))
        assert one.device.native_device.counters().malformed == 4
        assert two.heard_nothing()
        for start, offset in ((14, size - 16), (size - 2, 0)):
            await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, 0, 0, 0, start, offset, 0))
        frames = [frame for _, frame in await two.frames(2)]
        assert [frame[:-2] for frame in frames] == [BROADCAST + one.mac + body[:-2]] * 2
        assert all(frame[-2:] != body[-2:] for frame in frames)


@every_switch
@pytest.mark.parametrize("kind", KINDS)
async def test_segments_larger_than_the_packet_leave_one(reactor: str, ring: str, kind: str) -> None:
    async with lan(reactor, ring, 0, GUEST_OFFLOADS) as (one, two):
        two.listen(4)
        body, start, offset = packet(kind, pattern(1000, 5))
        await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, GSO[kind], 0, 0xFFFF, start, offset, 0))
        ((_, frame),) = await two.frames()
        assert check_sums(frame) == pattern(1000, 5)
        assert two.heard_nothing()
