"""The little of the Internet's protocols that a station of a test speaks: ARP, DHCP, ping, UDP, TCP."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Final

from kit.net.packets import check_sums, internet_sum
from kit.net.station import BROADCAST, Station

ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD
_ICMP, _TCP, _UDP = 1, 6, 17
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
_DHCP_MAGIC: Final = b"\x63\x82\x53\x63"
_ANY: Final = IPv4Address("0.0.0.0")


def ethertype(frame: bytes) -> int:
    kind: int = struct.unpack_from(">H", frame, 12)[0]
    return kind


class Host:
    """A station with an address, and a router's MAC address once ``arp`` found it."""

    def __init__(self, station: Station, address: str = "0.0.0.0", network: int = 24) -> None:
        self.station = station
        self.address = IPv4Address(address)
        self.router = BROADCAST
        self.lease: dict[int, bytes] = {}
        self.boot_server = _ANY
        self.bootfile = ""

    async def arp(self, target: str) -> bytes:
        """The MAC address of ``target``, which is taken as that of the router."""
        wanted = IPv4Address(target).packed
        request = struct.pack(">HHBBH", 1, IPV4, 6, 4, 1) + self.station.mac + self.address.packed + bytes(6) + wanted
        await self.station.send(request + bytes(18), ethertype=ARP)
        frame = await self.station.wait_for(
            lambda f: ethertype(f) == ARP and f[20:22] == b"\0\2" and f[28:32] == wanted
        )
        self.router = frame[22:28]
        return self.router

    async def answer_arp(self, frame: bytes) -> None:
        """Answer a request for our own address."""
        if frame[20:22] == b"\0\1" and frame[38:42] == self.address.packed:
            reply = struct.pack(">HHBBH", 1, IPV4, 6, 4, 2) + self.station.mac + self.address.packed + frame[22:32]
            await self.station.send(reply + bytes(18), frame[22:28], ARP)

    async def _send(self, protocol: int, transport: bytes, target: IPv4Address) -> None:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(transport), 1, 0, 64, protocol, 0)
        head += self.address.packed + target.packed
        head = head[:10] + struct.pack(">H", 0xFFFF - internet_sum(head)) + head[12:]
        await self.station.send(head + transport, self.router, IPV4)

    async def _receive(self, protocol: int) -> tuple[IPv4Address, bytes]:
        """Source and transport of the next packet of that protocol for us; its checksums are right."""
        while True:
            frame = await self.station.next_frame()
            if ethertype(frame) == ARP:
                await self.answer_arp(frame)
            elif ethertype(frame) == IPV4 and frame[23] == protocol:
                (total,) = struct.unpack_from(">H", frame, 16)
                if protocol in (_TCP, _UDP):
                    check_sums(frame[: 14 + total])
                return IPv4Address(frame[26:30]), frame[34 : 14 + total]

    def _pseudo(self, protocol: int, target: IPv4Address, transport: bytes) -> bytes:
        return self.address.packed + target.packed + struct.pack(">HH", protocol, len(transport))

    async def ping(self, target: str) -> None:
        """Send an echo request and wait for its answer."""
        body = struct.pack(">HH", 7, 1) + os.urandom(32)
        request = struct.pack(">BBH", 8, 0, 0xFFFF - internet_sum(b"\x08\0" + body)) + body
        await self._send(_ICMP, request, IPv4Address(target))
        while True:
            source, reply = await self._receive(_ICMP)
            if source == IPv4Address(target) and reply[0] == 0 and reply[4:] == body:
                return

    async def send_udp(self, target: str, port: int, data: bytes, *, own_port: int = 4000) -> None:
        udp = struct.pack(">HHHH", own_port, port, 8 + len(data), 0) + data
        total = internet_sum(self._pseudo(_UDP, IPv4Address(target), udp) + udp)
        udp = udp[:6] + struct.pack(">H", (0xFFFF - total) or 0xFFFF) + data
        await self._send(_UDP, udp, IPv4Address(target))

    async def receive_udp(self, *, own_port: int = 4000) -> bytes:
        while True:
            _, udp = await self._receive(_UDP)
            if struct.unpack_from(">H", udp, 2)[0] == own_port:
                return udp[8:]

    # ---- TFTP, RFC 1350 ----

    async def tftp(self, server: str, name: str, *, own_port: int = 4001) -> bytes:
        """The file of that name; ``RefusedError`` when the server has none for us."""
        await self.send_udp(server, 69, b"\0\1" + name.encode() + b"\0octet\0", own_port=own_port)
        data = b""
        for block in itertools.count(1):
            answer = await self.receive_udp(own_port=own_port)
            if answer[:2] == b"\0\5":
                raise RefusedError(answer[4:-1].decode())
            assert struct.unpack_from(">HH", answer) == (3, block)
            data += answer[4:]
            await self.send_udp(server, 69, struct.pack(">HH", 4, block), own_port=own_port)
            if len(answer) < 4 + 512:
                break
        return data

    # ---- DHCP, RFC 2131 ----

    async def dhcp(self) -> None:
        """Get an address, all the options that come with it in ``lease``, and what to boot."""
        offer = await self._dhcp(1, b"")
        wanted = offer[16:20]
        server = dhcp_options(offer)[54]
        ack = await self._dhcp(3, bytes([50, 4]) + wanted + bytes([54, 4]) + server)
        assert ack[16:20] == wanted
        self.lease = dhcp_options(ack)
        self.boot_server, self.bootfile = IPv4Address(ack[20:24]), ack[108:236].rstrip(b"\0").decode()
        self.address = IPv4Address(wanted)

    async def _dhcp(self, kind: int, options: bytes) -> bytes:
        """Send a message; the answer to it."""
        transaction = os.urandom(4)
        message = struct.pack(">BBBB", 1, 1, 6, 0) + transaction + bytes(20) + self.station.mac + bytes(10 + 192)
        message += _DHCP_MAGIC + bytes([53, 1, kind]) + options + b"\xff"
        self.address = _ANY
        await self.send_udp("255.255.255.255", 67, message, own_port=68)
        while True:
            answer = await self.receive_udp(own_port=68)
            if answer[4:8] == transaction:
                return answer

    async def connect(self, target: str, port: int, own_port: int = 5000) -> Connection:
        connection = Connection(self, IPv4Address(target), own_port, port)
        await connection._send(SYN)
        await connection._until(lambda flags: flags & (SYN | ACK) == SYN | ACK)
        return connection

    async def accept(self, port: int) -> Connection:
        """A connection that somebody else makes to ``port``."""
        while True:
            source, tcp = await self._receive(_TCP)
            their_port, own_port, number = struct.unpack_from(">HHI", tcp)
            if own_port == port and tcp[13] & (SYN | ACK) == SYN:
                connection = Connection(self, source, port, their_port)
                connection.expected = number + 1 & 0xFFFFFFFF
                await connection._send(SYN | ACK)
                return connection


def dhcp_options(message: bytes) -> dict[int, bytes]:
    """What a DHCP message carries, by the numbers of RFC 2132."""
    assert message[236:240] == _DHCP_MAGIC
    found, at = {}, 240
    while message[at] != 255:
        if message[at] == 0:
            at += 1
            continue
        size = message[at + 1]
        found[message[at]] = message[at + 2 : at + 2 + size]
        at += 2 + size
    return found


class RefusedError(Exception):
    """The other side does not want this connection."""


class Connection:
    """One TCP connection over a network that loses nothing."""

    def __init__(self, host: Host, target: IPv4Address, own_port: int, port: int) -> None:
        self._host = host
        self._target = target
        self._ports = own_port, port
        self._number = 1000
        self.expected = 0
        self.received = b""
        self.finished = False

    async def _send(self, flags: int, data: bytes = b"") -> None:
        head = struct.pack(">HHIIBBHHH", *self._ports, self._number, self.expected, 0x50, flags, 60000, 0, 0)
        total = internet_sum(self._host._pseudo(_TCP, self._target, head + data) + head + data)
        await self._host._send(_TCP, head[:16] + struct.pack(">H", 0xFFFF - total) + head[18:] + data, self._target)
        self._number += len(data) + (1 if flags & (SYN | FIN) else 0)

    async def _take(self) -> int:
        """Take one segment, and acknowledge what is in it; its flags."""
        while True:
            source, tcp = await self._host._receive(_TCP)
            port, own_port, number, _, size, flags = struct.unpack_from(">HHIIBB", tcp)
            if source != self._target or (own_port, port) != self._ports:
                continue
            if flags & RST:
                raise RefusedError
            data = tcp[(size >> 4) * 4 :]
            if flags & SYN:
                self.expected = number
            if number == self.expected and (data or flags & (SYN | FIN)):
                self.expected = number + len(data) + (1 if flags & (SYN | FIN) else 0) & 0xFFFFFFFF
                self.received += data
                self.finished |= bool(flags & FIN)
                await self._send(ACK)
            return int(flags)

    async def _until(self, enough: Callable[[int], bool]) -> None:
        while not enough(await self._take()):
            pass

    async def send(self, data: bytes) -> None:
        for at in range(0, len(data), 1400):
            await self._send(ACK | PSH, data[at : at + 1400])

    async def receive(self, size: int) -> bytes:
        """``size`` bytes, or fewer at the end."""
        while len(self.received) < size and not self.finished:
            await self._take()
        found, self.received = self.received[:size], self.received[size:]
        return found

    async def finish(self) -> None:
        """Say that nothing more comes, and wait until the other side says so."""
        await self._send(FIN | ACK)
        while not self.finished:
            await self._take()
