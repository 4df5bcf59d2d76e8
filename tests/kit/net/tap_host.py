"""Both ends of a tap: the device's guest, by hand, and the host with a packet socket."""

from __future__ import annotations

import socket
import struct

import trio
from kit.front_end.frontend import Guest, Plugged

from virtio.devices.net.device import Net, NetOptions
from virtio.testing.queue import GUARD

RECEIVE, TRANSMIT = 0, 1
PLAIN = bytes(12)
HOST = bytes.fromhex("020000000001")
ETHERTYPE = 0x88B5  # for local experiments
VNET_HEADER = 10  # what a packet socket shows of the virtio header
PACKET_VNET_HDR = 15
SOL_PACKET = 263


def on_tap(queues: int = 1, **options: object) -> Net:
    return Net("lan", NetOptions(backend="tap", tap="hb0", **options), queues, 256)


class Host:
    """The host's end of the tap: a packet socket on it."""

    def __init__(self, *, offloads: bool = False) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        if offloads:
            self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.bind(("hb0", 3))
        self.socket.setblocking(False)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def send(self, frame: bytes) -> None:
        self.socket.send(frame)

    async def received(self, ethertype: int = ETHERTYPE, skip: int = 0) -> bytes:
        """The next frame of that type; the host's own chatter (IPv6) is passed over."""
        with trio.fail_after(GUARD):
            while True:
                await trio.lowlevel.wait_readable(self.socket)
                data, address = self.socket.recvfrom(70000)
                if address[2] == socket.PACKET_OUTGOING:
                    continue
                if struct.unpack_from(">H", data, skip + 12)[0] == ethertype:
                    return data


def frame(to: bytes, source: bytes, payload: bytes) -> bytes:
    return to + source + struct.pack(">H", ETHERTYPE) + payload


async def send(p: Plugged, data: bytes, header: bytes = PLAIN, pair: int = 0) -> None:
    await p.guest.queues[2 * pair + TRANSMIT].request([header, data], [])


def listen(guest: Guest, count: int = 32, size: int = 2000) -> None:
    for _ in range(count):
        guest.queues[RECEIVE].driver.add([], [size])
    guest.queues[RECEIVE].kick()


async def heard_all(p: Plugged, size: int, queue: int = RECEIVE) -> list[tuple[bytes, bytes]]:
    """Header and frame of each of ours that comes to the guest, until there are ``size`` bytes of them."""
    found: list[tuple[bytes, bytes]] = []
    waiting: list[bytes] = []
    with trio.fail_after(GUARD):
        while sum(len(frame) for _, frame in found) < size:
            for used in await p.guest.queues[queue].used():
                waiting.append(b"".join(used.buffers)[: used.written])
                if len(waiting) < struct.unpack_from("<H", waiting[0], 10)[0]:
                    continue
                whole = b"".join(waiting)
                waiting = []
                if whole[12 + 6 : 12 + 12] == HOST:
                    found.append((whole[:12], whole[12:]))
    return found


async def heard(p: Plugged, queue: int = RECEIVE) -> tuple[bytes, bytes]:
    """The next one, where no more than one comes."""
    (found,) = await heard_all(p, 1, queue)
    return found
