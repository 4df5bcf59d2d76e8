"""A guest's side of the socket device, for tests: packets by hand, and connections with their credit (5.10.6).

Knows the header's layout by itself, so that it shares no mistake with the device.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import trio

from virtio.devices.vsock.device import Vsock
from virtio.devices.vsock.options import VsockOptions
from virtio.testing.queue import GUARD, GuestQueue

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
STREAM, SEQPACKET = 1, 2
SHUT_RECEIVE, SHUT_SEND, SHUT_BOTH = 1, 2, 3
EOM: Final = 1
HEADER: Final = struct.Struct("<QQIIIHHIII")
HOST: Final = 2
CID: Final = 7
F_SEQPACKET: Final = 1
RECEIVE_QUEUE, TRANSMIT_QUEUE, EVENT_QUEUE = 0, 1, 2


def vsock(folder: Path, *, cid: int = CID, name: str = "vsock", **options: object) -> Vsock:
    settings = VsockOptions.model_validate({"cid": cid, "path": folder / name, **options})
    return Vsock(name, settings, 1, 64)


class HasQueues(Protocol):
    """Whatever drives a device."""

    queues: list[GuestQueue]


class Heard(NamedTuple):
    """A packet of the device's."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes

    @property
    def meaning(self) -> tuple[int, int, int]:
        """Operation, the host's port, the guest's."""
        return self.op, self.src_port, self.dst_port


class VsockGuest:
    """The driver of one device. Keeps ``buffers`` buffers of ``room`` bytes in the receive queue."""

    def __init__(self, driver: HasQueues, *, cid: int = CID, buffers: int = 32, room: int = 4096) -> None:
        self.driver = driver
        self.cid = cid
        self.room = HEADER.size + room
        self._heard: list[Heard] = []
        self.post(buffers)

    def post(self, count: int) -> None:
        """Give the device further buffers."""
        queue = self.driver.queues[RECEIVE_QUEUE]
        for _ in range(count):
            queue.driver.add([], [self.room])
        queue.kick()

    def packet(
        self,
        op: int,
        src_port: int,
        dst_port: int,
        data: bytes = b"",
        *,
        dst_cid: int = HOST,
        src_cid: int | None = None,
        type: int = STREAM,
        flags: int = 0,
        length: int | None = None,
        buf_alloc: int = 1 << 18,
        fwd_cnt: int = 0,
    ) -> bytes:
        source = self.cid if src_cid is None else src_cid
        length = len(data) if length is None else length
        return HEADER.pack(source, dst_cid, src_port, dst_port, length, type, op, flags, buf_alloc, fwd_cnt) + data

    async def say(self, op: int, src_port: int, dst_port: int, data: bytes = b"", **fields: Any) -> None:
        """Send one packet, and wait until the device has taken it."""
        await self.say_raw(self.packet(op, src_port, dst_port, data, **fields))

    async def say_raw(self, packet: bytes) -> None:
        assert (await self.driver.queues[TRANSMIT_QUEUE].request([packet], [])).written == 0

    async def hear(self) -> Heard:
        """The next packet of the device's."""
        while not self._heard:
            answers = await self.driver.queues[RECEIVE_QUEUE].used()
            for used in answers:
                raw = used.buffers[0][: used.written]
                packet = Heard._make([*HEADER.unpack_from(raw), raw[HEADER.size :]])
                assert packet.dst_cid == self.cid
                assert packet.len == len(packet.data)
                self._heard.append(packet)
            self.post(len(answers))
        return self._heard.pop(0)

    def clear(self) -> None:
        """Forget what was heard and not asked for; the buffers go back to the device."""
        self._heard.clear()
        self.post(len(self.driver.queues[RECEIVE_QUEUE].driver.used()))

    async def silence(self) -> None:
        """Nothing more comes from the device, now that all tasks wait."""
        await trio.testing.wait_all_tasks_blocked()
        assert not self._heard
        assert self.driver.queues[RECEIVE_QUEUE].driver.used() == []

    async def connect(
        self, port: int, dst_port: int, *, type: int = STREAM, dst_cid: int = HOST, buf_alloc: int = 1 << 18
    ) -> GuestSocket:
        """Connect to the host, or to another guest."""
        await self.say(REQUEST, port, dst_port, type=type, dst_cid=dst_cid, buf_alloc=buf_alloc)
        answer = await self.hear()
        assert answer.meaning == (RESPONSE, dst_port, port)
        assert (answer.type, answer.src_cid) == (type, dst_cid)
        return GuestSocket(self, port, dst_port, type, dst_cid, buf_alloc, answer.buf_alloc)

    async def accept(self, port: int, *, type: int = STREAM, buf_alloc: int = 1 << 18) -> GuestSocket:
        """Accept the connection that somebody asks for at ``port``."""
        asked = await self.hear()
        assert (asked.op, asked.dst_port, asked.type, asked.len) == (REQUEST, port, type, 0)
        await self.say(RESPONSE, port, asked.src_port, type=type, dst_cid=asked.src_cid, buf_alloc=buf_alloc)
        return GuestSocket(self, port, asked.src_port, type, asked.src_cid, buf_alloc, asked.buf_alloc)


class GuestSocket:
    """One connection of the guest's, which keeps to the rules of credit. One task at a time uses it."""

    def __init__(
        self, guest: VsockGuest, port: int, peer_port: int, type: int, peer_cid: int, buf_alloc: int, credit: int
    ) -> None:
        self.guest, self.port, self.peer_port, self.type, self.peer_cid = guest, port, peer_port, type, peer_cid
        self.buf_alloc = buf_alloc
        self.peer_buf_alloc = credit
        self.sent = self.peer_fwd_cnt = 0
        self.received = 0
        self.shut = 0

    async def say(self, op: int, data: bytes = b"", *, flags: int = 0, fwd_cnt: int | None = None) -> None:
        await self.guest.say(
            *(op, self.port, self.peer_port, data),
            dst_cid=self.peer_cid,
            type=self.type,
            flags=flags,
            buf_alloc=self.buf_alloc,
            fwd_cnt=(self.received if fwd_cnt is None else fwd_cnt) & 0xFFFF_FFFF,
        )

    async def hear(self) -> Heard:
        """The next packet, which is for this connection."""
        packet = await self.guest.hear()
        assert (packet.dst_port, packet.src_port, packet.src_cid) == (self.port, self.peer_port, self.peer_cid)
        self.peer_buf_alloc, self.peer_fwd_cnt = packet.buf_alloc, packet.fwd_cnt
        self.received += packet.len
        if packet.op == SHUTDOWN:
            self.shut |= packet.flags
        return packet

    @property
    def credit(self) -> int:
        return self.peer_buf_alloc - (self.sent - self.peer_fwd_cnt)

    async def send(self, data: bytes, *, piece: int = 65536, end: bool = True) -> None:
        """Send all of ``data``, as there is credit for it; as one message of a seqpacket, or without ``end`` a part."""
        while True:
            part = data[: min(piece, self.credit)]
            data = data[len(part) :]
            self.sent += len(part)
            await self.say(RW, part, flags=EOM if self.type == SEQPACKET and not data and end else 0)
            if not data:
                return
            while self.credit <= 0:
                assert (await self.hear()).op == CREDIT_UPDATE

    async def receive(self, count: int) -> bytes:
        """So many bytes of the host's; the device is told of the room that there is again."""
        data = b""
        while len(data) < count:
            packet = await self.hear()
            if packet.op == CREDIT_REQUEST:
                await self.say(CREDIT_UPDATE)
            if packet.op in (CREDIT_REQUEST, CREDIT_UPDATE):
                continue
            assert packet.op == RW, packet
            data += packet.data
            if self.received % self.buf_alloc < packet.len:
                await self.say(CREDIT_UPDATE)
        assert len(data) == count
        return data

    async def receive_message(self) -> bytes:
        """A whole message of a seqpacket."""
        data = b""
        while True:
            packet = await self.hear()
            if packet.op == CREDIT_REQUEST:
                await self.say(CREDIT_UPDATE)
            if packet.op in (CREDIT_REQUEST, CREDIT_UPDATE):
                continue
            assert packet.op == RW, packet
            data += packet.data
            if packet.flags & EOM:
                await self.say(CREDIT_UPDATE)
                return data


async def connected_client(path: Path, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> HostSocket:
    """A program of the host that has said CONNECT; ``HostSocket.greeted`` waits for the answer."""
    client = trio.socket.socket(socket.AF_UNIX, kind)
    await client.connect(str(path))
    await client.send(b"CONNECT %d\n" % port)
    return HostSocket(client)


class HostSocket:
    """The host program's end of a connection."""

    def __init__(self, raw: trio.socket.SocketType) -> None:
        self.raw = raw

    async def greeted(self) -> int:
        """Wait for ``OK PORT``; the port."""
        with trio.fail_after(GUARD):
            line = await self.raw.recv(32)
        assert line.startswith(b"OK "), line
        assert line.endswith(b"\n")
        return int(line[3:-1])

    async def receive(self, count: int) -> bytes:
        data = b""
        with trio.fail_after(GUARD):
            while len(data) < count:
                piece = await self.raw.recv(count - len(data))
                assert piece, f"the end after {len(data)} bytes of {count}"
                data += piece
        return data

    async def receive_message(self) -> bytes:
        with trio.fail_after(GUARD):
            return bytes(await self.raw.recv(1 << 20))

    async def send(self, data: bytes) -> None:
        with trio.fail_after(GUARD):
            while data:
                data = data[await self.raw.send(data) :]

    async def at_end(self) -> None:
        """Wait for the end of what the guest sends."""
        with trio.fail_after(GUARD):
            assert await self.raw.recv(1) == b""

    def close(self) -> None:
        self.raw.close()


class HostListener:
    """A program of the host that listens for the guest at ``path_PORT``."""

    def __init__(self, folder: Path, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        self._socket = socket.socket(socket.AF_UNIX, kind)
        self._socket.bind(str(folder / f"vsock_{port}"))
        self._socket.listen()
        self._socket.setblocking(False)

    async def accept(self) -> HostSocket:
        with trio.fail_after(GUARD):
            client, _ = await trio.socket.from_stdlib_socket(self._socket).accept()
        return HostSocket(client)

    def close(self) -> None:
        self._socket.close()


async def pair(guest: VsockGuest, folder: Path, port: int = 1024) -> tuple[GuestSocket, HostSocket]:
    """A stream from port 5000 of the guest to a program of the host."""
    listener = HostListener(folder, port)
    inside = await guest.connect(5000, port)
    outside = await listener.accept()
    listener.close()
    return inside, outside


async def works(guest: VsockGuest, folder: Path) -> None:
    """A new connection does what it should."""
    inside, outside = await pair(guest, folder, 4242)
    await inside.send(b"well?")
    assert await outside.receive(5) == b"well?"
    await inside.say(RST)
    await outside.at_end()
    outside.close()


async def send_many(queue: GuestQueue, packets: list[bytes]) -> None:
    """All packets, a ringful at a time."""
    for start in range(0, len(packets), 60):
        part = packets[start : start + 60]
        for packet in part:
            queue.driver.add([packet], [])
        queue.kick()
        await queue.used(len(part))
