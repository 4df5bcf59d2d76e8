"""The host's side of the socket device: Unix sockets in the style that Firecracker and cloud-hypervisor share.

A program on the host connects to ``path`` and says ``CONNECT PORT\\n``; once the guest accepts it reads ``OK PORT\\n``,
and from then on it is connected. A guest that connects to port N of the host (CID 2) comes to the socket ``path_N``, on
which a program of the host listens. Where whole messages travel (SOCK_SEQPACKET) it is ``path.seqpacket``, and a
``path_N`` of that kind.
"""

from __future__ import annotations

import errno
import re
import select
import socket as sockets
from pathlib import Path
from typing import Final

import structlog
import trio

from virtio.clients import Door
from virtio.devices.vsock.packet import VIRTIO_VSOCK_TYPE_SEQPACKET, VIRTIO_VSOCK_TYPE_STREAM
from virtio.socket_file import Listen, SocketFile

SOCKET_KINDS: Final = {
    VIRTIO_VSOCK_TYPE_STREAM: sockets.SOCK_STREAM,
    VIRTIO_VSOCK_TYPE_SEQPACKET: sockets.SOCK_SEQPACKET,
}
BACKLOG: Final = 64
CLIENTS_MAX: Final = 64
"""Clients of one socket that have not said yet what they want."""

COMMAND_MAX: Final = 32
COMMAND_SECONDS: Final = 10
_SO_PEEK_OFF: Final = 42  # asm-generic/socket.h; Python has no name for it
_CREDENTIALS_SPACE: Final = sockets.CMSG_SPACE(12)  # struct ucred
PORT_MAX: Final = 0xFFFF_FFFF

log = structlog.get_logger()


class HostListener:
    """A listening Unix socket for connections to the guest (mode 0600), of one of the virtio types."""

    def __init__(self, path: Path, type: int) -> None:
        """``HostError``: it cannot be made there, or somebody listens there already."""
        self.type: Final = type
        self._file = SocketFile(Listen(path, kind=SOCKET_KINDS[type], backlog=BACKLOG))
        listener = trio.socket.from_stdlib_socket(self._file.socket)
        self._door = Door(listener, "a client of vsock", log.bind(socket=str(path)))

    async def accept(self) -> sockets.socket:
        """The next client's socket; waits out a lack of file descriptors."""
        client = await self._door.accept()
        return sockets.socket(fileno=client.detach())

    def close(self) -> None:
        self._file.close()


def connect(path: Path, type: int) -> sockets.socket | None:
    """A socket connected to whoever listens at ``path``; ``None`` when nobody takes it at once."""
    try:
        socket = sockets.socket(sockets.AF_UNIX, SOCKET_KINDS[type])
    except OSError as error:
        log.warning("a guest's connection cannot be made", socket=str(path), error=str(error))
        return None
    socket.setblocking(False)
    try:
        socket.connect(str(path))
    except OSError as error:
        socket.close()
        log.debug("a guest's connection is refused", socket=str(path), error=str(error))
        return None
    return socket


async def read_command(socket: sockets.socket) -> int | None:
    """The port of a client's ``CONNECT PORT``; ``None``: it said something else, left, or took too long."""
    line = b""
    is_stream = socket.type == sockets.SOCK_STREAM
    with trio.move_on_after(COMMAND_SECONDS):
        while not line.endswith(b"\n") and len(line) < COMMAND_MAX:
            await trio.lowlevel.wait_readable(socket)
            try:
                # Byte by byte where there are no messages: what follows the line is for the guest.
                piece = socket.recv(1 if is_stream else COMMAND_MAX)
            except BlockingIOError:
                continue
            except OSError:
                return None
            line += piece
            if not piece or not is_stream:
                break
    return None if is_stream and line[-1:] != b"\n" else _port_of(line)


def _port_of(line: bytes) -> int | None:
    """The port of a command, in all the ways that Firecracker and cloud-hypervisor take it.

    CONNECT in any case, any white space between and around the words, a plus sign or zeros before the number, and words
    behind it that mean nothing. A command longer than their buffer (32 bytes) is refused, for its port would be cut.
    """
    try:
        word, number, *_ = line.decode().split()
    except ValueError:  # no text, or too few words
        return None
    if word.lower() != "connect" or not re.fullmatch(r"\+?[0-9]+", number, re.ASCII) or int(number) > PORT_MAX:
        return None
    return int(number)


def prepare_for_messages(socket: sockets.socket, message_size: int) -> None:
    """Messages of that size can be sent, as far as the host allows; those that are received can be peeked at."""
    socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, message_size)
    socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_PASSCRED, 1)  # so an empty message is told from the end
    socket.setsockopt(sockets.SOL_SOCKET, _SO_PEEK_OFF, 0)  # from here on each look goes on where the last one ended


def receive_bytes(socket: sockets.socket, room: memoryview) -> int | None:
    """Of a stream, into ``room``, which is not empty; how many. ``None`` at the end."""
    return socket.recv_into(room) or None


def peek_message(socket: sockets.socket, room: memoryview) -> int | None:
    """Read on in the first message, which stays in the socket; how much was left of it before. ``None`` at the end."""
    flags = sockets.MSG_PEEK | sockets.MSG_TRUNC
    left, credentials, _, _ = socket.recvmsg_into([room], _CREDENTIALS_SPACE, flags)
    return left if left or credentials else None  # credentials come with every message, and not with the end


def take_message(socket: sockets.socket) -> None:
    """Remove the first message, which is there."""
    socket.recv(1)


def has_gone(socket: sockets.socket) -> bool:
    """The other end is closed altogether: it has not only finished writing."""
    poll = select.poll()
    poll.register(socket, 0)
    return bool(poll.poll(0))


async def gone(socket: sockets.socket) -> None:
    """Wait until the other end is closed altogether."""
    try:
        waiter = select.epoll()
    except OSError:  # no descriptor left: so it is noticed when the guest sends
        await trio.sleep_forever()
    with waiter:
        waiter.register(socket, 0)  # hanging up is always told
        await trio.lowlevel.wait_readable(waiter.fileno())


def shut_down(socket: sockets.socket, how: int) -> None:
    """shutdown(2), where the other end may have gone already."""
    try:
        socket.shutdown(how)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
