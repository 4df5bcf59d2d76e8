"""Offloads on a real tap: passed on whole where both sides have them, finished by the kernel where a guest has not."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from kit.front_end.frontend import Plugged, Setting, every_reactor, plugged
from kit.guest.blk import pattern
from kit.net.own_network import own_network
from kit.net.packets import GSO, KINDS, LIES, check_sums, packet
from kit.net.tap_host import HOST, VNET_HEADER, Host, frame, heard, heard_all, listen, on_tap, send

from virtio.devices.net.device import Net

GSO_ECN = 0x80
F_GUEST_CSUM, F_GUEST_ECN = 1 << 1, 1 << 9
F_GUEST_SEGMENTS = 1 << 7 | 1 << 8 | F_GUEST_ECN | 1 << 54 | 1 << 55
TYPES = {"4": 0x0800, "6": 0x86DD}
TCP_CWR = 0x80


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


def device_of(p: Plugged) -> Net:
    assert isinstance(p.device, Net)
    return p.device


def device_for(kind: str) -> Net:
    device = on_tap()
    assert device._tap is not None
    if "udp" in kind and not device._tap.segments_udp:
        device.close()
        pytest.skip("this kernel's tun has no TUN_F_USO4 (Linux 6.2 has)")
    return device


@every_reactor
@pytest.mark.parametrize("kind", [*KINDS, "tcp4 ecn", "tcp6 ecn"])
async def test_large_packets_pass_whole_both_ways(setting: Setting, kind: str) -> None:
    kind, _, ecn = kind.partition(" ")
    gso_type = GSO[kind] | (GSO_ECN if ecn else 0)
    body, start, offset = packet(kind, pattern(9000, 3))
    async with plugged(device_for(kind), setting) as p:
        mac = device_of(p).mac
        with Host(offloads=True) as host:
            listen(p.guest)
            headers = start + (8 if "udp" in kind else 20)
            header = struct.pack("<BBHHHHH", 1, gso_type, headers, 1400, start, offset, 0)
            await send(p, HOST + mac + body, header)
            whole = await host.received(TYPES[kind[-1]], VNET_HEADER)
            assert struct.unpack_from("<BB2xHHH", whole) == (1, gso_type, 1400, start, offset)
            assert whole[VNET_HEADER:] == HOST + mac + body
            host.send(header[:VNET_HEADER] + mac + HOST + body)
            got, back = await heard(p)
            assert struct.unpack_from("<BBHHHH", got)[:2] == (1, gso_type)
            assert struct.unpack_from("<4xHHH", got) == (1400, start, offset)
            assert struct.unpack_from("<2xH", got)[0] >= headers
            assert back == mac + HOST + body


@every_reactor
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("declined", [F_GUEST_SEGMENTS, F_GUEST_SEGMENTS | F_GUEST_CSUM], ids=["segments", "all"])
async def test_a_large_packet_is_cut_for_a_guest_that_declined_them(setting: Setting, kind: str, declined: int) -> None:
    payload = pattern(5000, 3)
    body, start, offset = packet(kind, payload)
    async with plugged(device_for(kind), setting, without=declined) as p:
        mac = device_of(p).mac
        with Host(offloads=True) as host:
            listen(p.guest)
            headers = start + (8 if "udp" in kind else 20)
            header = struct.pack("<BBHHHHH", 1, GSO[kind], headers, 1400, start, offset, 0)
            host.send(header[:VNET_HEADER] + mac + HOST + body)
            got = await heard_all(p, 4 * headers + len(payload))
            assert [header[1] for header, _ in got] == [0] * 4
            if declined & F_GUEST_CSUM:
                assert [header for header, _ in got] == [bytes(10) + b"\1\0"] * 4
                assert b"".join(check_sums(frame) for _, frame in got) == payload
            else:
                assert b"".join(frame[headers:] for _, frame in got) == payload


@every_reactor
@pytest.mark.parametrize("kind", KINDS)
async def test_a_checksum_is_finished_for_a_guest_that_does_not_do_it(setting: Setting, kind: str) -> None:
    body, start, offset = packet(kind, pattern(777, 3))
    async with plugged(on_tap(), setting, without=F_GUEST_CSUM | F_GUEST_SEGMENTS) as p:
        with Host(offloads=True) as host:
            listen(p.guest)
            mac = device_of(p).mac
            host.send(struct.pack("<BBHHHH", 1, 0, 0, 0, start, offset) + mac + HOST + body)
            header, back = await heard(p)
            assert header == bytes(10) + b"\1\0"
            assert check_sums(back) == pattern(777, 3)


@every_reactor
async def test_ecn_is_cut_for_a_guest_that_declined_that_alone(setting: Setting) -> None:
    """5.1.3.1: GUEST_ECN says that segments with CWR set may be whole."""
    payload = pattern(5000, 3)
    body, start, offset = packet("tcp4", payload)
    async with plugged(on_tap(), setting, without=F_GUEST_ECN) as p:
        with Host(offloads=True) as host:
            listen(p.guest)
            mac = device_of(p).mac
            header = struct.pack("<BBHHHH", 1, GSO["tcp4"] | GSO_ECN, start + 20, 1400, start, offset)
            host.send(header + mac + HOST + body)
            got = await heard_all(p, 4 * (start + 20) + len(payload))
            assert [header[1] for header, _ in got] == [0] * 4
            assert b"".join(back[start + 20 :] for _, back in got) == payload
            assert [back[start + 13] & TCP_CWR for _, back in got] == [TCP_CWR, 0, 0, 0]


@every_reactor
@pytest.mark.parametrize(("lie", "seen_by"), LIES, ids=str)
async def test_a_header_that_lies_costs_nobody_but_its_frame(
    setting: Setting, lie: tuple[int, int, int, int, int, int, int], seen_by: str
) -> None:
    async with plugged(on_tap(), setting) as p:
        device = device_of(p)
        with Host() as host:
            body, _, _ = packet("tcp4", pattern(1300, 5))
            await send(p, HOST + device.mac + body, struct.pack("<BBHHHHH", *lie))
            lost = device.native_device.counters()
            # What is no lie towards us may be one towards the kernel, which refuses or repairs it.
            assert (lost.malformed, lost.dropped) in ([(1, 0)] if seen_by == "sender" else [(0, 0), (0, 1)])
            out = frame(HOST, device.mac, b"honest" * 10)
            await send(p, out)
            assert await host.received() == out
            listen(p.guest)
            host.send(frame(device.mac, HOST, b"and back" * 10))
            assert (await heard(p))[1] == frame(device.mac, HOST, b"and back" * 10)
