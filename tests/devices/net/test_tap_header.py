"""What a tap's kernel says of a frame, passed on to the driver as the specification has it; no tap is needed."""

from __future__ import annotations

import socket
import struct
from typing import Any, cast

import pytest
from kit.front_end.frontend import Setting, every_reactor, plugged
from kit.net.packets import GSO, KINDS, check_sums, packet

from virtio.devices.net.device import Net, NetOptions
from virtio.devices.net.tap import Tap
from virtio.fd import OwnedFd

ADDRESSES = b"\xff" * 6 + bytes.fromhex("020000000001")
NEEDS_CSUM, DATA_VALID = 1, 2
F_GUEST_CSUM = 1 << 1
F_GUEST_OFFLOADS = F_GUEST_CSUM | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 54 | 1 << 55


class SocketAsTap:
    """A socket whose other end is the host's: a message has the header that a tap would give, and a frame."""

    segments_udp = True

    def __init__(self) -> None:
        ours, self.host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.fds = [OwnedFd(ours.detach())]

    def set_offloads(self, bits: int) -> None:
        """Whoever writes to ``host`` is the kernel, and says what it likes."""

    def close(self) -> None:
        self.fds[0].close()
        self.host.close()


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> SocketAsTap:
    tap = SocketAsTap()
    monkeypatch.setattr(Net, "_open_tap", lambda _: cast(Tap, tap))
    return tap


def header(flags: int, gso_type: int = 0, *rest: int) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso_type, *rest, *[0] * (5 - len(rest)))


async def heard(tap: SocketAsTap, head: bytes, frame: bytes, without: int, setting: Setting) -> tuple[Any, ...]:
    """The fields of the header that the driver gets, and the frame."""
    device = Net("lan", NetOptions(backend="tap", tap="hb0"), 1, 256)
    async with plugged(device, setting, without=without) as p:
        p.guest.queues[0].driver.add([], [20000])
        p.guest.queues[0].kick()
        tap.host.send(head + frame)
        (used,) = await p.guest.queues[0].used()
        whole = used.buffers[0][: used.written]
        return *struct.unpack("<BBHHHHH", whole[:12]), whole[12:]


@every_reactor
async def test_a_driver_without_guest_csum_is_not_told_that_a_checksum_is_right(
    tap: SocketAsTap, setting: Setting
) -> None:
    frame = ADDRESSES + packet("tcp4", b"x" * 100)[0]
    said = header(DATA_VALID, 0, 0, 0, 34, 16)
    assert await heard(tap, said, frame, F_GUEST_OFFLOADS, setting) == (0, 0, 0, 0, 0, 0, 1, frame)


@every_reactor
async def test_a_driver_with_guest_csum_is_told_that_a_checksum_is_right(tap: SocketAsTap, setting: Setting) -> None:
    frame = ADDRESSES + packet("tcp4", b"x" * 100)[0]
    assert await heard(tap, header(DATA_VALID), frame, 0, setting) == (DATA_VALID, 0, 0, 0, 0, 0, 1, frame)


@every_reactor
async def test_a_driver_without_guest_csum_gets_finished_checksums(tap: SocketAsTap, setting: Setting) -> None:
    body, start, offset = packet("tcp6", b"x" * 101)
    said = header(NEEDS_CSUM | DATA_VALID, 0, 0, 0, start, offset)
    *fields, frame = await heard(tap, said, ADDRESSES + body, F_GUEST_OFFLOADS, setting)
    assert fields == [0, 0, 0, 0, 0, 0, 1]
    assert check_sums(frame) == b"x" * 101


@every_reactor
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", [0, 150], ids=["unsaid", "said"])
async def test_a_large_packet_has_its_headers_length(tap: SocketAsTap, setting: Setting, kind: str, said: int) -> None:
    body, start, offset = packet(kind, b"x" * 9000)
    length = said or start + (8 if "udp" in kind else 20)
    head = header(NEEDS_CSUM, GSO[kind], said, 1400, start, offset)
    expected = (NEEDS_CSUM, GSO[kind], length, 1400, start, offset, 1, ADDRESSES + body)
    assert await heard(tap, head, ADDRESSES + body, 0, setting) == expected


@every_reactor
@pytest.mark.parametrize(("offset", "length"), [(0x10, 34 + 20), (0x80, 34 + 32), (0xF0, 34 + 40)], ids=str)
async def test_headers_are_no_longer_than_the_packet_and_no_shorter_than_any(
    tap: SocketAsTap, setting: Setting, offset: int, length: int
) -> None:
    body = bytearray(packet("tcp4", b"x" * 20)[0])
    body[34 - 12 + 12] = offset
    head = header(NEEDS_CSUM, GSO["tcp4"], 0, 10, 34, 16)
    assert (await heard(tap, head, ADDRESSES + body, 0, setting))[2] == length


LIES = {
    "a checksum before the frame": header(NEEDS_CSUM, 0, 0, 0, 13, 0),
    "a checksum behind the frame": header(NEEDS_CSUM, 0, 0, 0, 34, 0xFFFF),
    "a checksum that begins behind the frame": header(NEEDS_CSUM, 0, 0, 0, 0xFFF0, 16),
    "segments of no size": header(NEEDS_CSUM, GSO["tcp4"], 54, 0, 34, 16),
    "segments of no kind": header(NEEDS_CSUM, 2, 54, 1400, 34, 16),
    "ECN without segments": header(NEEDS_CSUM, 0x80, 54, 1400, 34, 16),
}


@every_reactor
@pytest.mark.parametrize("without", [0, F_GUEST_OFFLOADS], ids=["offloads", "none"])
async def test_a_header_that_lies_costs_its_frame_and_no_other(
    tap: SocketAsTap, setting: Setting, without: int
) -> None:
    device = Net("lan", NetOptions(backend="tap", tap="hb0"), 1, 256)
    frame = ADDRESSES + packet("tcp4", b"x" * 100)[0]
    async with plugged(device, setting, without=without) as p:
        queue = p.guest.queues[0]
        for _ in range(len(LIES) + 1):
            queue.driver.add([], [20000])
        queue.kick()
        for lie in LIES.values():
            tap.host.send(lie + frame)
        tap.host.send(header(0) + frame)
        (used,) = await queue.used()
        assert used.buffers[0][12 : used.written] == frame
        assert device.native_device.counters().misreceived == len(LIES)


@every_reactor
@pytest.mark.parametrize("short", [b"x", bytes(12), bytes(12) + ADDRESSES + b"\x08"], ids=len)
async def test_what_is_too_short_for_a_frame_does_not_hold_up_those_behind_it(
    tap: SocketAsTap, setting: Setting, short: bytes
) -> None:
    device = Net("lan", NetOptions(backend="tap", tap="hb0"), 1, 256)
    frame = ADDRESSES + packet("tcp4", b"x" * 100)[0]
    async with plugged(device, setting) as p:
        queue = p.guest.queues[0]
        count = 200  # more than one turn looks at
        for _ in range(10):
            queue.driver.add([], [20000])
        queue.kick()
        tap.host.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for _ in range(count):
            tap.host.send(short)
        tap.host.send(header(0) + frame)
        (used,) = await queue.used()
        assert used.buffers[0][12 : used.written] == frame
        assert device.native_device.counters().misreceived == count
