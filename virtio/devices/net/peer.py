"""The network device's peer at the other end of a socket, in the formats of QEMU's netdevs ``stream`` and ``dgram``.

A stream has a length of 32 bits (big-endian) before each frame; its connections come and go, so a task passes frames
on between it and the data plane's socket. Datagrams are frames: their socket is the data plane's own.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
import trio

from virtio.clients import Door
from virtio.devices.net.peer_options import Address, SocketOptions, parse_address
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.remedies import with_remedy

FRAME_MAX: Final = 14 + 8 + 0xFFFF
"""The longest frame the data plane knows: Ethernet, two VLAN tags, an IP packet."""

BATCH_MAX: Final = 256 * 1024
"""Bytes on their way to a peer, or from it, that are held at a time."""

STALL_MAX: Final = 10.0
"""Seconds after which a peer that takes nothing is given up, for the guest's queue stands still meanwhile."""

RETRY_MIN: Final = 0.1
RETRY_MAX: Final = 4.0
"""Seconds between two attempts to reach a peer, doubled each time."""

LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at who is behind the path of a datagram socket, for nobody says when that changes."""

_LENGTH: Final = struct.Struct(">I")


class Peer(Protocol):
    """What is behind a device: ``fd`` is a socket with a frame a message, ``run`` lives as long as the device."""

    fd: OwnedFd

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...
    def close(self) -> None: ...


def open_socket(device: str, options: SocketOptions) -> Peer:
    """The socket that ``options`` ask for; ``HostError`` names the address that cannot be had."""
    local = parse_address(options.local) if options.local is not None else None
    remote = parse_address(options.remote) if options.remote is not None else None
    if local is not None and remote is not None:
        return DatagramPeer(device, local, remote)
    return StreamPeer(device, local, remote)


class _Place:
    """A socket bound to an address; a Unix socket's file goes with it."""

    def __init__(self, address: Address, kind: socket.SocketKind) -> None:
        self._path = Path(address.path) if address.path else None
        self._identity: tuple[int, int] | None = None
        try:
            family, name = _resolve(address, kind)
            self.socket: Final = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise _cannot(address, error) from error
        try:
            if self._path is not None:
                _remove_dead(self._path, kind)
                os.fchmod(self.socket.fileno(), 0o600)  # the file's mode, from its first moment on
                self.socket.bind(name)
                self._identity = _identity(self._path)
            else:
                if kind == socket.SOCK_STREAM:
                    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.socket.bind(name)
            if kind == socket.SOCK_STREAM:
                self.socket.listen(4)
        except OSError as error:
            self.close()
            raise _cannot(address, error) from error

    def close(self) -> None:
        self.socket.close()
        if self._path is not None and self._identity is not None and _identity(self._path) == self._identity:
            self._path.unlink(missing_ok=True)
        self._identity = None


def _cannot(address: Address, error: OSError) -> HostError:
    number, text = error.errno or 0, f"{address}: {error.strerror or error}"
    if address.path:
        text = with_remedy(text, Path(address.path), number, writing=True)
    return HostError(text, errno=number)


def _resolve(address: Address, kind: socket.SocketKind) -> tuple[int, Any]:
    if address.path:
        return socket.AF_UNIX, address.path
    found = socket.getaddrinfo(address.host, address.port, type=kind, flags=socket.AI_PASSIVE)
    return found[0][0], found[0][4]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = path.lstat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _remove_dead(path: Path, kind: socket.SocketKind) -> None:
    """Remove what a daemon that died left behind."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED:
            path.unlink(missing_ok=True)


# ---- datagrams ----


class DatagramPeer:
    """A frame a datagram, straight to and from the data plane."""

    def __init__(self, device: str, local: Address, remote: Address) -> None:
        self._log = structlog.get_logger().bind(device=device, peer=str(remote))
        self._place = _Place(local, socket.SOCK_DGRAM)
        self._remote = remote
        self._there = False
        try:
            if remote.path:
                self._look()
            else:
                # Connected, so that the kernel keeps everybody else's datagrams out.
                family = self._place.socket.family
                found = socket.getaddrinfo(remote.host, remote.port, family=family, type=socket.SOCK_DGRAM)
                self._place.socket.connect(found[0][4])
            self.fd = OwnedFd(os.dup(self._place.socket.fileno()))
        except OSError as error:
            self._place.close()
            raise _cannot(remote, error) from error

    def _look(self) -> None:
        """Connect to whoever has the path now: it is another socket after that one started anew."""
        code = self._place.socket.connect_ex(self._remote.path)
        there = code == 0
        if there != self._there:
            self._there = there
            self._log.info("network peer is there" if there else "network peer is gone", reason=os.strerror(code))

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while self._remote.path:
            await trio.sleep(LOOK_INTERVAL)
            self._look()

    def close(self) -> None:
        self._place.close()
        self.fd.close()


# ---- streams ----


class _Connection:
    """One connection to a peer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.scope = trio.CancelScope()
        self.end = "the peer closed it"

    def finish(self, reason: str) -> None:
        if not self.scope.cancel_called:
            self.end = reason
        self.scope.cancel()

    async def send(self, data: bytes) -> None:
        """All of ``data``, or the connection ends."""
        rest = memoryview(data)
        while rest and not self.scope.cancel_called:
            with trio.move_on_after(STALL_MAX) as patience:
                try:
                    rest = rest[await self.stream.socket.send(rest) :]
                except (OSError, trio.ClosedResourceError) as error:
                    self.finish(str(error))
            if patience.cancelled_caught:
                self.finish(f"the peer took nothing for {STALL_MAX:g} s")


class StreamPeer:
    """Frames with their lengths before them, over a connection that is made again whenever it ends.

    One peer at a time; a new one takes over from the one before. Without one, what the guest sends is lost.
    """

    def __init__(self, device: str, local: Address | None, remote: Address | None) -> None:
        self._address = local or remote
        self._log = structlog.get_logger().bind(device=device, peer=str(self._address))
        self._place = _Place(local, socket.SOCK_STREAM) if local is not None else None
        self._connection: _Connection | None = None
        theirs, self._guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.fd = OwnedFd(theirs.detach())

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._from_guest)
            task_status.started()
            if self._place is not None:
                await self._accept(self._place, nursery)
            else:
                await self._connect()

    async def _accept(self, place: _Place, nursery: trio.Nursery) -> None:
        door = Door(trio.socket.from_stdlib_socket(place.socket), "a network peer", self._log)
        while True:
            client = await door.accept()
            if self._connection is not None:
                self._connection.finish("another peer took over")
            nursery.start_soon(self._talk, trio.SocketStream(client))

    async def _connect(self) -> None:
        delay, told = RETRY_MIN, False
        while True:
            try:
                stream = await self._open()
            except OSError as error:
                if not told:
                    self._log.warning("network peer cannot be reached; trying on", error=str(error))
                    told = True
                await trio.sleep(delay)
                delay = min(2 * delay, RETRY_MAX)
                continue
            delay, told = RETRY_MIN, False
            await self._talk(stream)
            await trio.sleep(delay)

    async def _open(self) -> trio.SocketStream:
        assert self._address is not None
        if self._address.path:
            return await trio.open_unix_socket(self._address.path)
        return await trio.open_tcp_stream(self._address.host, self._address.port)

    async def _talk(self, stream: trio.SocketStream) -> None:
        _keep_alive(stream)
        connection = self._connection = _Connection(stream)
        self._log.info("network peer connected")
        async with stream:
            with connection.scope:
                await self._from_peer(connection)
        if self._connection is connection:
            self._connection = None
        self._log.info("network peer disconnected", reason=connection.end)

    async def _from_peer(self, connection: _Connection) -> None:
        waiting = bytearray()
        while True:
            try:
                data = await connection.stream.receive_some(BATCH_MAX)
            except trio.BrokenResourceError as error:
                connection.end = str(error.__cause__ or error)
                return
            if not data:
                return
            waiting += data
            at = 0
            while len(waiting) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(waiting, at)
                if length > FRAME_MAX:
                    connection.end = f"the peer announced a frame of {length} bytes; the longest has {FRAME_MAX}"
                    return
                end = at + _LENGTH.size + length
                if len(waiting) < end:
                    break
                if length:  # an empty message would look like the end of the guest's socket
                    await self._to_guest(waiting[at + _LENGTH.size : end])
                at = end
            del waiting[:at]

    async def _to_guest(self, frame: bytearray) -> None:
        """Waits while the guest takes nothing: then the peer, too, has to wait."""
        while True:
            try:
                self._guest.send(frame)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._guest)
            else:
                return

    async def _from_guest(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._guest)
            batch = bytearray()
            while len(batch) < BATCH_MAX:
                try:
                    frame = self._guest.recv(FRAME_MAX)
                except BlockingIOError:
                    break
                batch += _LENGTH.pack(len(frame)) + frame
            if self._connection is not None:
                await self._connection.send(bytes(batch))

    def close(self) -> None:
        if self._place is not None:
            self._place.close()
        self._guest.close()
        self.fd.close()


def _keep_alive(stream: trio.SocketStream) -> None:
    """A TCP peer whose host is gone is noticed within a minute, also when nothing is sent."""
    if stream.socket.family != socket.AF_UNIX:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
