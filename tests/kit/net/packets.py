"""Packets with unfinished checksums as a guest hands them over, and whether a frame's sums are right."""

from __future__ import annotations

import struct


def internet_sum(data: bytes) -> int:
    words = struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1])
    total: int = sum(words) + (data[-1] << 8 if len(data) & 1 else 0)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet(kind: str, payload: bytes, *, vlan: bool = False) -> tuple[bytes, int, int]:
    """What follows the addresses: type, IP and TCP or UDP headers with the pseudo header's sum where the checksum
    goes, and payload. With the frame's offsets of the transport header and its checksum in that header."""
    six, udp = "6" in kind, "udp" in kind
    transport_size = 8 if udp else 20
    length = transport_size + len(payload)
    protocol = 17 if udp else 6
    if six:
        source, target = bytes(range(16)), bytes(range(16, 32))
        ip = struct.pack(">IHBB", 6 << 28, length, protocol, 64) + source + target
        pseudo = source + target + struct.pack(">II", length, protocol)
    else:
        source, target = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 7, 0x4000, 64, protocol, 0) + source + target
        ip = ip[:10] + struct.pack(">H", 0xFFFF - internet_sum(ip)) + ip[12:]
        pseudo = source + target + struct.pack(">HH", protocol, length)
    partial = internet_sum(pseudo)
    if udp:
        transport = struct.pack(">HHHH", 1000, 2000, length, partial)
    else:
        transport = struct.pack(">HHIIBBHHH", 1000, 2000, 5000, 1, 0x50, 0x99, 512, partial, 0)  # CWR ACK PSH FIN
    ether = (b"\x81\x00\x00\x05" if vlan else b"") + (b"\x86\xdd" if six else b"\x08\x00")
    return ether + ip + transport + payload, 12 + len(ether) + len(ip), 6 if udp else 16


def check_sums(frame: bytes) -> bytes:
    """The transport's payload, once lengths and checksums of the frame were found right."""
    at = 14
    kind = frame[12:14]
    if kind == b"\x81\x00":
        at, kind = 18, frame[16:18]
    if kind == b"\x08\x00":
        assert internet_sum(frame[at : at + 20]) == 0xFFFF
        total, protocol = struct.unpack_from(">2xH5xB", frame, at)
        transport = frame[at + 20 : at + total]
        pseudo = frame[at + 12 : at + 20] + struct.pack(">HH", protocol, len(transport))
    else:
        length, protocol = struct.unpack_from(">4xHB", frame, at)
        transport = frame[at + 40 : at + 40 + length]
        pseudo = frame[at + 8 : at + 40] + struct.pack(">II", length, protocol)
    assert at + (20 if kind == b"\x08\x00" else 40) + len(transport) == len(frame)
    assert internet_sum(pseudo + transport) == 0xFFFF
    if protocol == 17:
        assert struct.unpack_from(">H", transport, 4)[0] == len(transport)
    return transport[8 if protocol == 17 else 20 :]


KINDS = ("tcp4", "tcp6", "udp4", "udp6")
GSO = {"tcp4": 1, "tcp6": 4, "udp4": 5, "udp6": 5}

LIES: tuple[tuple[tuple[int, int, int, int, int, int, int], str], ...] = (
    ((1, 1, 0, 0, 34, 16, 0), "sender"),  # segments of no bytes
    ((1, 1, 0, 1, 34, 16, 0), "nobody"),  # as many segments as bytes: honest, and slow for nobody but the sender
    ((0, 1, 0, 1400, 34, 16, 0), "sender"),  # segments without a checksum
    ((1, 1, 0, 1400, 0xFFFF, 16, 0), "sender"),
    ((1, 1, 0, 1400, 34, 0xFFFF, 0), "sender"),
    ((1, 1, 0, 1400, 0xFFFF, 0xFFFF, 0), "sender"),  # whose sum is inside, in 16 bits
    ((1, 0, 0, 0, 0xFFFF, 0xFFFF, 0), "sender"),
    ((1, 0, 0, 0, 13, 16, 0), "sender"),  # a checksum that begins in the Ethernet header
    ((1, 1, 0, 1400, 13, 16, 0), "sender"),
    ((1, 1, 0, 1400, 20, 16, 0), "receiver"),  # the transport inside the IP header
    ((1, 1, 0, 1400, 34, 6, 0), "receiver"),
    ((1, 4, 0, 1400, 34, 16, 0), "receiver"),  # version 6, it says
    ((1, 5, 0, 1400, 34, 16, 0), "receiver"),
    ((1, 3, 0, 1400, 34, 16, 0), "sender"),  # UFO, which nobody offered
    ((1, 2, 0, 1400, 34, 16, 0), "sender"),  # no type at all
    ((1, 0x80, 0, 1400, 34, 16, 0), "sender"),  # ECN of nothing
    ((1, 0x81, 0, 1400, 34, 16, 0), "nobody"),  # ECN
    ((0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF), "sender"),
)
"""Headers of a TCP packet over IPv4 of 1300 bytes that are false or odd, and who sees that: the sender's side, or the
receiver's when it cuts and sums the packet."""
