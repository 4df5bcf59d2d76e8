"""The front-end's side of vhost-user for tests: bytes built independently of the code under test, a
scripted front-end, and an account of open descriptors."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from transports.base import BackendLike
from transports.vhost_user.requests.config_space import ReadConfig
from transports.vhost_user.requests.device import StopDevice
from transports.vhost_user.requests.memory import SetMemory
from transports.vhost_user.requests.negotiation import SetFeatures
from transports.vhost_user.requests.operation import Answer, Operation, Value
from transports.vhost_user.requests.rings import StopQueue
from transports.vhost_user.requests.table import MESSAGES
from transports.vhost_user.serving.endpoint import Endpoint
from transports.vhost_user.serving.server import VhostUserServer
from transports.vhost_user.session import ConfigureQueue, Session
from transports.vhost_user.wire.message import UNSUPPORTED
from virtio.errors import HyperbellError, PeerError
from virtio.testing.queue import GUARD

F_PROTOCOL_FEATURES = 1 << 30
F_VERSION_1 = 1 << 32
F_ACCESS_PLATFORM = 1 << 33
F_RING_PACKED = 1 << 34
DEVICE_FEATURES = F_VERSION_1 | F_ACCESS_PLATFORM | F_RING_PACKED | 1 << 9 | 1 << 29

MQ, REPLY_ACK, BACKEND_REQ, CONFIG = 1 << 0, 1 << 3, 1 << 5, 1 << 9
RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS = 1 << 13, 1 << 15, 1 << 16
RARP, NET_MTU = 1 << 2, 1 << 4  # of network interfaces only
INBAND_NOTIFICATIONS = 1 << 14
ALL_PROTOCOL_FEATURES = MQ | REPLY_ACK | BACKEND_REQ | CONFIG | RESET_DEVICE | CONFIGURE_MEM_SLOTS | STATUS

VERSION, REPLY, NEED_REPLY = 1, 4, 8
MIB = 1 << 20
UVA = 0x7F00_0000_0000  # where memory is shared in these tests

MESSAGE_NAMES = {number: row.name for number, row in MESSAGES.items()} | dict(UNSUPPORTED)

chunked = pytest.mark.parametrize("chunk", [0, 1, 5], ids=["whole", "byte_by_byte", "in_fives"])
"""Runs a test with messages that arrive whole, one byte at a time, and five bytes at a time."""


# --- bytes ---


def message(request: int, payload: bytes = b"", *, flags: int = VERSION, need_reply: bool = False) -> bytes:
    return struct.pack("=III", request, flags | (NEED_REPLY if need_reply else 0), len(payload)) + payload


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def vring_state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


def vring_addr(
    index: int, desc: int = UVA + 0x1000, avail: int = UVA + 0x2000, used: int = UVA + 0x3000, flags: int = 0
) -> bytes:
    return struct.pack("=IIQQQQ", index, flags, desc, used, avail, 0)


def region(gpa: int, size: int, uva: int, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", gpa, size, uva, offset)


def single_region(gpa: int, size: int, uva: int, offset: int = 0) -> bytes:
    return bytes(8) + region(gpa, size, uva, offset)


def mem_table(*regions: bytes, count: int | None = None) -> bytes:
    return struct.pack("=II", len(regions) if count is None else count, 0) + b"".join(regions)


def config(offset: int, data: bytes, *, flags: int = 0, size: int | None = None) -> bytes:
    return struct.pack("=III", offset, len(data) if size is None else size, flags) + data


def iotlb(kind: int, iova: int, size: int = 0, uva: int = 0, perm: int = 0) -> bytes:
    return struct.pack("=QQQBB6x", iova, size, uva, perm, kind)


def reply_to(request: int, payload: bytes) -> bytes:
    return message(request, payload, flags=VERSION | REPLY)


# --- descriptors ---


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def eventfds(count: int) -> list[int]:
    return [eventfd() for _ in range(count)]


def memfd(size: int = MIB) -> int:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.truncate(fd, size)
    return fd


def open_fds() -> dict[str, str]:
    """Every open descriptor of this process and what it is, less the one this is read through."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[entry.name] = str(entry.readlink())
    return {number: target for number, target in found.items() if target != f"/proc/{os.getpid()}/fd"}


@contextlib.contextmanager
def no_fd_leaks() -> Iterator[None]:
    """Fails unless exactly the descriptors that were open before are open afterwards."""
    before = open_fds()
    yield
    assert open_fds() == before


@contextlib.contextmanager
def no_further_descriptors(left: int = 0) -> Iterator[None]:
    """Whoever wants one gets EMFILE, when ``left`` of them are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(left + 1)]  # the lowest there are
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- a session and its front-end, without sockets ---


@dataclass
class Dialogue:
    """Talks to a session in chunks of ``chunk`` bytes (0: whole messages)."""

    chunk: int = 0
    device_features: int = DEVICE_FEATURES
    queue_count: int = 2
    queue_size_max: int = 256
    is_network_interface: bool = False
    inband_notifications: bool = False
    offers_config: bool = True
    session: Session = field(init=False)
    starts: list[ConfigureQueue] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session = Session(
            device_features=self.device_features,
            queue_count=self.queue_count,
            queue_size_max=self.queue_size_max,
            is_network_interface=self.is_network_interface,
            inband_notifications=self.inband_notifications,
            offers_config=self.offers_config,
        )

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Deliver a message; nothing may come out before its last byte is in."""
        step = self.chunk or len(data)
        for start in range(0, len(data), step):
            self.session.receive(data[start : start + step], fds if start == 0 else ())
            if start + step < len(data):
                assert self.session.next_request() is None

    def plan(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, need_reply: bool = False
    ) -> Operation:
        """What a message asks for; it stays unanswered."""
        self.feed(message(request, payload, need_reply=need_reply), fds)
        planned = self.session.next_request()
        assert planned is not None
        assert planned.message.number == request
        self.planned = planned
        return planned.operation

    def accept(self, value: Value = 0) -> bytes:
        """The operation is done, and the back-end has every ring that became whole by it: ``starts``."""
        reply = self.session.accept(self.planned, value)
        self.starts = []
        while (start := self.session.next_start()) is not None:
            self.starts.append(start)
            self.session.started(start.index)
        return reply

    def reject(self, error: HyperbellError | None = None) -> bytes:
        return self.session.reject(self.planned, error or PeerError("it does not work"))

    def ask(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        value: Value | None = None,
    ) -> bytes:
        """A message that is carried out at once; its reply."""
        operation = self.plan(request, payload, fds, need_reply=need_reply)
        if value is None:
            value = usual_value(operation)
        for fd in self.planned.fds:
            if not isinstance(operation, SetMemory):
                fd.close()
        return self.accept(value)

    def negotiate(
        self, features: int = F_VERSION_1 | F_PROTOCOL_FEATURES, protocol: int = ALL_PROTOCOL_FEATURES
    ) -> None:
        """As QEMU does it: protocol features first, then the owner, then the features."""
        self.ask(1)
        self.ask(15)
        self.ask(16, u64(protocol))
        self.ask(3)
        self.ask(2, u64(features))

    def share_memory(self) -> None:
        self.ask(5, mem_table(region(0, MIB, UVA)), [memfd()])

    def set_up_ring(self, index: int = 0, size: int = 128, base: int = 0) -> None:
        self.ask(8, vring_state(index, size))
        self.ask(10, vring_state(index, base))
        self.ask(9, vring_addr(index))

    def start_ring(self, index: int = 0) -> None:
        self.ask(12, u64(index), [eventfd()])

    def violate(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), **options: bool) -> str:
        """A message that must end the connection: what its ``PeerError`` says, which names the request."""
        return self.violate_raw(message(request, payload, **options), fds)

    def violate_raw(self, data: bytes, fds: Sequence[int] = ()) -> str:
        """The same for arbitrary bytes."""
        with pytest.raises(PeerError) as caught:
            self._deliver(data, fds)
        name = MESSAGE_NAMES.get(int.from_bytes(data[:4], sys.byteorder), "unknown")
        # Too many descriptors with the very first byte are seen before the request's number.
        assert caught.value.request == name or (self.chunk and caught.value.request == "unknown")
        self.session.receive(message(1), [eventfd()])  # a closed session closes what still comes
        assert self.session.next_request() is None
        return str(caught.value)

    def _deliver(self, data: bytes, fds: Sequence[int]) -> None:
        self.feed(data, fds)
        self.session.next_request()

    def close(self) -> None:
        """End it, and with it what a back-end would own by now."""
        self.session.close()
        for one in self.session.state.memory.regions:
            one.fd.close()


def usual_value(operation: Operation) -> Value:
    match operation:
        case Answer(value=value):
            return value
        case StopQueue(base=base):
            return base or 0
        case ReadConfig(size=size):
            return bytes(size)
        case SetFeatures(suspend=suspend):
            return dict.fromkeys(suspend, 0)
        case StopDevice(running=running):
            return dict.fromkeys(running, 0)
        case _:
            return 0


# --- a server and a front-end on real sockets ---


@contextlib.asynccontextmanager
async def serving(backend: BackendLike, endpoint: Endpoint, limit: float = 20) -> AsyncIterator[VhostUserServer]:
    """A server that runs as long as the block, which may take at most ``limit`` seconds."""
    server = VhostUserServer(backend, endpoint)
    with trio.fail_after(limit):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            yield server
            nursery.cancel_scope.cancel()


class FrontEnd:
    """A scripted front-end on one end of a stream."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock

    @classmethod
    async def connect(cls, path: Path) -> FrontEnd:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(str(path))
        return cls(sock)

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send ``fds`` with the first byte, and close them here: the receiver has its own."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = await self.socket.sendmsg([data], ancillary)
        for fd in fds:
            os.close(fd)
        while sent < len(data):
            sent += await self.socket.send(data[sent:])

    async def receive(self) -> tuple[int, bytes]:
        """The next message: request number and payload."""
        request, flags, size = struct.unpack("=III", await self._exactly(12))
        assert flags & 3 == VERSION
        return request, await self._exactly(size)

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self.socket.recv(size - len(data))
            assert more, f"the stream ended after {len(data)} of {size} bytes"
            data += more
        return data

    async def ended(self) -> bool:
        """Wait for the other side to close; True if it did so without another word."""
        try:
            with trio.fail_after(GUARD):
                return await self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    async def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request that is always answered; the payload of its reply."""
        await self.send(message(request, payload), fds)
        number, answer = await self.receive()
        assert number == request
        return answer

    async def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A request with NEED_REPLY; the status it is answered with."""
        await self.send(message(request, payload, need_reply=True), fds)
        number, answer = await self.receive()
        assert number == request
        return int(struct.unpack("=Q", answer)[0])

    async def negotiate(
        self, features: int = F_VERSION_1 | F_PROTOCOL_FEATURES, protocol: int = ALL_PROTOCOL_FEATURES
    ) -> None:
        await self.send(message(3))  # the owner is offered all there is
        await self.send(message(16, u64(protocol)))
        assert await self.do(3) == 0
        assert await self.do(2, u64(features)) == 0

    async def start_ring(self, index: int = 0, *, share: bool = True) -> None:
        """Share memory, set a ring up and start it, enabled."""
        if share:
            assert await self.do(5, mem_table(region(0, MIB, UVA)), [memfd()]) == 0
        assert await self.do(8, vring_state(index, 128)) == 0
        assert await self.do(10, vring_state(index, 0)) == 0
        assert await self.do(9, vring_addr(index)) == 0
        assert await self.do(13, u64(index), [eventfd()]) == 0
        assert await self.do(14, u64(index), [eventfd()]) == 0
        assert await self.do(12, u64(index), [eventfd()]) == 0
        assert await self.do(18, vring_state(index, 1)) == 0
