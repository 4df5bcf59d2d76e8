"""A boot server as a station on a switch: it answers ARP, gives one address by DHCP, and has files by TFTP."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import trio
from kit.front_end.frontend import Guest
from kit.front_end.links import WaistLink
from kit.net.internet import ARP, IPV4, dhcp_options, ethertype
from kit.net.lan import BROADCAST, F_MRG_RXBUF, RECEIVE, Station
from kit.net.packets import internet_sum

from virtio.backend.backend import Backend
from virtio.devices.net.device import Net, NetOptions
from virtio.native.worker import Worker

OWN: Final = IPv4Address("10.9.0.1").packed
GUEST: Final = IPv4Address("10.9.0.15").packed
DISCOVER, OFFER, REQUEST, ACKNOWLEDGE = 1, 2, 3, 5
_DHCP_MAGIC: Final = b"\x63\x82\x53\x63"
_BUFFERS: Final = 32
_BLOCK: Final = 512


class BootServer:
    """Serves the files of ``folder``; DHCP names ``bootfile``. ``served`` are the names that were asked for."""

    def __init__(self, station: Station, folder: Path, bootfile: str) -> None:
        self._station = station
        self._bootfile = bootfile.encode()
        self._files = {path.name: path.read_bytes() for path in folder.iterdir()}
        # What is sent and in blocks of which size, by the client's port; ours is always 69, as libslirp's is.
        self._sending: dict[int, tuple[bytes, int]] = {}
        self.served: list[str] = []

    async def run(self) -> None:
        """Until it is cancelled."""
        self._listen(_BUFFERS)
        while True:
            try:
                frames = await self._station.frames()
            except trio.TooSlowError:
                continue  # firmware takes its time before it says anything
            self._listen(len(frames))
            for _, frame in frames:
                await self._take(frame)

    def _listen(self, buffers: int) -> None:
        self._station.listen(buffers)
        self._station.guest.queues[RECEIVE].kick()

    async def _take(self, frame: bytes) -> None:
        if ethertype(frame) == ARP and frame[20:22] == b"\0\1" and frame[38:42] == OWN:
            reply = struct.pack(">HHBBH", 1, IPV4, 6, 4, 2) + self._station.mac + OWN + frame[22:32]
            await self._send(frame[22:28], ARP, reply + bytes(18))
        elif ethertype(frame) == IPV4 and frame[23] == 17:
            await self._take_udp(frame)

    async def _take_udp(self, frame: bytes) -> None:
        transport = 14 + (frame[14] & 15) * 4
        source, target, length = struct.unpack_from(">HHH", frame, transport)
        data = frame[transport + 8 : transport + length]
        if target == 67:
            await self._answer_dhcp(data)
        elif frame[30:34] == OWN and target == 69 and data[:2] == b"\0\1":
            await self._begin_file(frame[6:12], source, data)
        elif frame[30:34] == OWN and target == 69 and data[:2] == b"\0\4" and source in self._sending:
            await self._send_block(frame[6:12], source, struct.unpack_from(">H", data, 2)[0] + 1)

    async def _answer_dhcp(self, message: bytes) -> None:
        kind = dhcp_options(message)[53][0]
        if kind not in (DISCOVER, REQUEST):
            return
        reply = struct.pack(">BBBB", 2, 1, 6, 0) + message[4:12] + bytes(4) + GUEST + OWN + bytes(4) + message[28:44]
        reply += bytes(64) + self._bootfile.ljust(128, b"\0") + _DHCP_MAGIC
        options = {
            53: bytes([OFFER if kind == DISCOVER else ACKNOWLEDGE]),
            54: OWN,  # the server
            51: b"\0\1\0\0",  # how long the address may be used
            1: b"\xff\xff\xff\0",
            3: OWN,  # the router
            66: str(IPv4Address(OWN)).encode(),  # who has the file
            67: self._bootfile,
        }
        reply += b"".join(bytes([code, len(value)]) + value for code, value in options.items()) + b"\xff"
        await self._send_udp(BROADCAST, b"\xff\xff\xff\xff", 67, 68, reply)

    async def _begin_file(self, mac: bytes, port: int, request: bytes) -> None:
        name, _mode, *asked = (word.decode() for word in request[2:].rstrip(b"\0").split(b"\0"))
        name = name.lstrip("/")
        if name not in self._files:
            await self._send_udp(mac, GUEST, 69, port, b"\0\5\0\1no such file\0")
            return
        self.served.append(name)
        file = self._files[name]
        options = {key.lower(): value for key, value in zip(asked[::2], asked[1::2], strict=True)}
        # GRUB 2.06 reads no file to its end whose size it was not told (tsize, RFC 2349).
        agreed = {"tsize": str(len(file)), "blksize": options.get("blksize", "")}
        agreed = {key: value for key, value in agreed.items() if key in options}
        self._sending[port] = file, int(agreed.get("blksize", _BLOCK))
        if agreed:
            words = "".join(f"{key}\0{value}\0" for key, value in agreed.items())
            await self._send_udp(mac, GUEST, 69, port, b"\0\6" + words.encode())
        else:
            await self._send_block(mac, port, 1)

    async def _send_block(self, mac: bytes, port: int, number: int) -> None:
        file, size = self._sending[port]
        if (number - 1) * size <= len(file):
            block = file[(number - 1) * size :][:size]
            await self._send_udp(mac, GUEST, 69, port, struct.pack(">HH", 3, number) + block)

    async def _send_udp(self, mac: bytes, target: bytes, source_port: int, target_port: int, data: bytes) -> None:
        udp = struct.pack(">HHHH", source_port, target_port, 8 + len(data), 0) + data
        total = internet_sum(OWN + target + struct.pack(">HH", 17, len(udp)) + udp)
        udp = udp[:6] + struct.pack(">H", (0xFFFF - total) or 0xFFFF) + data
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + OWN + target
        head = head[:10] + struct.pack(">H", 0xFFFF - internet_sum(head)) + head[12:]
        await self._send(mac, IPV4, head + udp)

    async def _send(self, mac: bytes, kind: int, packet: bytes) -> None:
        await self._station.send(mac, struct.pack(">H", kind) + packet)


@contextlib.asynccontextmanager
async def boot_server(worker: Worker, switch: str, folder: Path, bootfile: str) -> AsyncIterator[BootServer]:
    """On ``switch``, as the modern driver of another port; the ports of a switch share a worker."""
    device = Net("server", NetOptions(backend="switch", switch=switch), 1, 256)
    with contextlib.closing(device):
        async with Backend(device, workers=[worker]) as backend:
            with contextlib.closing(Guest(WaistLink(backend))) as guest:
                await guest.start(without=F_MRG_RXBUF)  # a frame is one buffer
                server = BootServer(Station(guest, device), folder, bootfile)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.run)
                    yield server
                    nursery.cancel_scope.cancel()
