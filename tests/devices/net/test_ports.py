"""Ports of a switch that differ: in their MTU, and in how many pairs of queues they have."""

from __future__ import annotations

import struct

import pytest
from kit.front_end.frontend import REACTORS, RINGS
from kit.guest.blk import pattern
from kit.net.lan import BROADCAST, Station, lan
from kit.net.packets import GSO, KINDS, check_sums, packet

from virtio.native.nic import NicCounters

F_MTU = 1 << 3
F_GUEST_OFFLOADS = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 54 | 1 << 55
MTU = 1000
ARP, VLAN, QINQ = b"\x08\x06", b"\x81\x00\x00\x05", b"\x88\xa8\x00\x06"

every_switch = pytest.mark.parametrize(("reactor", "ring"), [(r, f) for r in REACTORS for f in RINGS])


def counters(station: Station) -> NicCounters:
    return station.device.native_device.counters()


# ---- MTU (5.1.4.1) ----


@every_switch
@pytest.mark.parametrize("tags", [b"", VLAN, QINQ + VLAN], ids=["", "vlan", "qinq"])
async def test_a_packet_larger_than_the_receivers_mtu_does_not_reach_it(reactor: str, ring: str, tags: bytes) -> None:
    async with lan(reactor, ring, 0, 0, 0, mtus=(3000, MTU, None)) as (one, small, any_size):
        for station in (small, any_size):
            station.listen(8)
        sent = [tags + ARP + pattern(size, size) for size in (3000 - len(tags), MTU + 1, MTU)]
        for body in sent:
            await one.send(BROADCAST, body)
        assert await small.frames() == [(bytes(10) + b"\1\0", BROADCAST + one.mac + sent[-1])]
        assert counters(small) == NicCounters(refused=2)
        assert [frame[12:] for _, frame in await any_size.frames(3)] == sent
        assert counters(any_size) == NicCounters()


@every_switch
async def test_a_tag_that_is_cut_off_makes_no_packet_smaller_than_it_is(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0, mtus=(None, 68)) as (one, small):
        small.listen()
        for body in (QINQ + QINQ + QINQ + bytes(67), QINQ + VLAN + ARP + bytes(69), b"\x81\x00", QINQ + b"\x81\x00"):
            await one.send(BROADCAST, body)
        frames = [frame[12:] for _, frame in await small.frames(2)]
        assert frames == [b"\x81\x00", QINQ + b"\x81\x00"]
        assert counters(small) == NicCounters(refused=2)


@every_switch
async def test_a_driver_that_did_not_ask_for_the_mtu_gets_packets_of_any_size(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, F_MTU, mtus=(None, MTU)) as (one, small):
        small.listen()
        await one.send(BROADCAST, ARP + pattern(3000, 1))
        ((_, frame),) = await small.frames()
        assert frame[14:] == pattern(3000, 1)


@every_switch
async def test_an_mtu_that_a_front_end_tells_holds_until_the_reset(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0, mtus=(None, MTU)) as (one, small):
        small.device.set_mtu(500)
        small.listen()
        await one.send(BROADCAST, ARP + pattern(501, 1))
        assert counters(small) == NicCounters(refused=1)
        await small.guest.link.reset()
        small.guest.forget_queues()
        await small.guest.start()
        small.listen()
        await one.send(BROADCAST, ARP + pattern(MTU, 2))
        ((_, frame),) = await small.frames()
        assert frame[14:] == pattern(MTU, 2)


@every_switch
@pytest.mark.parametrize("kind", KINDS)
async def test_a_large_packet_may_be_larger_than_the_mtu_and_its_segments_may_not(
    reactor: str, ring: str, kind: str
) -> None:
    headers = (40 if "6" in kind else 20) + (8 if "udp" in kind else 20)
    async with lan(reactor, ring, 0, 0, F_GUEST_OFFLOADS, mtus=(None, MTU, MTU)) as (one, whole, cut):
        for station in (whole, cut):
            station.listen(16)
        payload = pattern(2500, 1)
        body, start, offset = packet(kind, payload, vlan=True)
        for size in (MTU - headers + 1, MTU - headers):
            await one.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, GSO[kind], 0, size, start, offset, 0))
        assert [frame[12:] for _, frame in await whole.frames(2)] == [body] * 2
        assert b"".join([check_sums(frame) for _, frame in await cut.frames(3)]) == payload
        assert counters(cut) == NicCounters(refused=1)


# ---- pairs (5.1.6.5.6) ----


async def use_pairs(station: Station, count: int) -> None:
    control = station.guest.queues[-1]
    assert (await control.request([b"\4\0" + struct.pack("<H", count)], [1])).buffers == [b"\0"]


def conversation(kind: str, number: int, *, back: bool) -> bytes:
    """A packet of one of several conversations, or of its answers."""
    body, start, _ = packet(kind, b"x" * 50)
    network = start - (40 if "6" in kind else 20)
    size = 16 if "6" in kind else 4
    at = network + (8 if "6" in kind else 12)
    here, there = body[at - 12 : at - 12 + size], body[at - 12 + size : at - 12 + 2 * size]
    ports = struct.pack(">HH", *((80, 4000 + number) if back else (4000 + number, 80)))
    ends = there + here if back else here + there
    body = body[: at - 12] + ends + body[at - 12 + 2 * size :]
    return body[: start - 12] + ports + body[start - 12 + 4 :]


@every_switch
@pytest.mark.parametrize("kind", KINDS)
async def test_answers_come_to_the_pair_that_the_conversation_was_sent_on(reactor: str, ring: str, kind: str) -> None:
    async with lan(reactor, ring, 0, 0, pairs=(1, 3)) as (one, many):
        await use_pairs(many, 3)
        for pair in range(3):
            many.listen(8, pair=pair)
        one.listen(8)
        for pair in (2, 1, 0, 1):
            await many.send(one.mac, conversation(kind, pair, back=False), pair=pair)
            await one.frames()
        for pair in (1, 2, 0, 2):
            answer = conversation(kind, pair, back=True)
            await one.send(many.mac, answer)
            assert (await many.frames(pair=pair))[0][1] == many.mac + one.mac + answer
        await one.send(many.mac, ARP + bytes(46))  # and what is no conversation comes by the sender's pair
        assert (await many.frames())[0][1][12:14] == ARP


@every_switch
async def test_a_pair_that_is_used_no_more_gets_no_answers(reactor: str, ring: str) -> None:
    async with lan(reactor, ring, 0, 0, pairs=(1, 2)) as (one, many):
        await use_pairs(many, 2)
        await many.send(BROADCAST, conversation("tcp4", 1, back=False), pair=1)
        await use_pairs(many, 1)
        many.listen()
        await one.send(many.mac, conversation("tcp4", 1, back=True))
        await many.frames()
