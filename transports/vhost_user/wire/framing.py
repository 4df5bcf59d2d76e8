"""From a stream of bytes and descriptors to whole messages; headers are validated here.

Descriptors belong to the message that holds the first byte they came with ("File descriptors" travel
with the first byte of a header; a peer that sends them with a later byte of the same message is
understood too). A reader that never asks for more than ``wanted_bytes`` cannot mix two messages up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transports.vhost_user.wire.message import UNKNOWN_REQUEST, Message, unserved
from transports.vhost_user.wire.numbers import (
    VHOST_USER_MAX_FDS,
    VHOST_USER_NEED_REPLY_MASK,
    VHOST_USER_REPLY_MASK,
    VHOST_USER_VERSION,
    VHOST_USER_VERSION_MASK,
)
from transports.vhost_user.wire.payloads import HEADER_SIZE, Header, parse_header
from virtio.errors import PeerError
from virtio.fd import OwnedFd


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole message. Header, payload size and number of descriptors agree with ``message``."""

    message: Message
    need_reply: bool
    payload: bytes
    fds: tuple[OwnedFd, ...]


class Framer:
    """Collects bytes and descriptors until a message is whole. Owns every descriptor until it is given out.

    ``rows``: the requests that are served, by number.
    """

    def __init__(self, rows: Mapping[int, Message]) -> None:
        self._rows = rows
        self._buffer = bytearray()
        self._consumed = 0  # stream position of _buffer[0]
        self._fds: deque[tuple[int, OwnedFd]] = deque()  # with the stream position they came at
        self._truncated_at: int | None = None
        self._closed = False

    def receive(self, data: bytes, fds: Iterable[OwnedFd], *, truncated: bool = False) -> None:
        """Take what one ``recvmsg`` brought; ``truncated`` says that descriptors were lost (MSG_CTRUNC)."""
        position = self._consumed + len(self._buffer)
        for fd in fds:
            if self._closed:
                fd.close()
            else:
                self._fds.append((position, fd))
        if not self._closed:
            self._buffer += data
            if truncated:
                self._truncated_at = position

    @property
    def wanted_bytes(self) -> int:
        """How many bytes complete the header, or the message once its header is here; at least 1."""
        if len(self._buffer) < HEADER_SIZE:
            return HEADER_SIZE - len(self._buffer)
        return max(1, HEADER_SIZE + parse_header(bytes(self._buffer)).size - len(self._buffer))

    @property
    def is_between_messages(self) -> bool:
        return not self._buffer

    def next_frame(self) -> Frame | None:
        """The next whole message, or None while bytes are missing.

        ``PeerError`` as soon as the header, the size or the descriptors are wrong, without waiting
        for the rest.
        """
        if len(self._buffer) < HEADER_SIZE:
            self._check_fds(range(VHOST_USER_MAX_FDS + 1), HEADER_SIZE, UNKNOWN_REQUEST, complete=False)
            return None
        header = parse_header(bytes(self._buffer))
        message = _check_header(header, self._rows)
        length = HEADER_SIZE + header.size
        complete = len(self._buffer) >= length
        self._check_fds(message.fds, length, message.name, complete=complete)
        if not complete:
            return None
        end = self._consumed + length
        frame = Frame(
            message,
            need_reply=bool(header.flags & VHOST_USER_NEED_REPLY_MASK),
            payload=bytes(self._buffer[HEADER_SIZE:length]),
            fds=tuple(self._take_fds(end)),
        )
        del self._buffer[:length]
        self._consumed = end
        return frame

    def close(self) -> None:
        """Close every descriptor that is not part of a message given out, and those still to come."""
        self._closed = True
        self._buffer.clear()
        while self._fds:
            self._fds.popleft()[1].close()

    def _check_fds(self, allowed: range, length: int, request: str, *, complete: bool) -> None:
        end = self._consumed + length
        if self._truncated_at is not None and self._truncated_at < end:
            raise PeerError("more file descriptors than could be received", request=request)
        count = sum(position < end for position, _ in self._fds)
        if count > allowed[-1]:
            raise PeerError(f"came with {count} file descriptors, at most {allowed[-1]} are allowed", request=request)
        if complete and count < allowed[0]:
            raise PeerError(f"came with {count} file descriptors, {allowed[0]} are needed", request=request)

    def _take_fds(self, end: int) -> Iterable[OwnedFd]:
        while self._fds and self._fds[0][0] < end:
            yield self._fds.popleft()[1]


def _check_header(header: Header, rows: Mapping[int, Message]) -> Message:
    """The table's row of a request whose header is valid ("Header").

    A request that is not served passes if its sender asks for a reply: it can be refused. Where nothing can be said the
    sender would go on as if it had been done, or wait for an answer, so its connection ends here.
    """
    message = rows.get(header.request) or unserved(header.request)
    version = header.flags & VHOST_USER_VERSION_MASK
    if version != VHOST_USER_VERSION:
        raise PeerError(f"protocol version {version} instead of {VHOST_USER_VERSION}", request=message.name)
    if header.flags & VHOST_USER_REPLY_MASK:
        raise PeerError("a reply, though nothing was asked on this channel", request=message.name)
    if header.flags & ~(VHOST_USER_VERSION_MASK | VHOST_USER_NEED_REPLY_MASK):
        raise PeerError(f"unknown header flags {header.flags:#x}", request=message.name)
    if header.request not in rows and not header.flags & VHOST_USER_NEED_REPLY_MASK:
        raise PeerError(why_unserved(message), request=message.name)
    if header.size not in message.sizes:
        least, most = message.sizes[0], message.sizes[-1]
        raise PeerError(f"payload of {header.size} bytes instead of {least} to {most}", request=message.name)
    return message


def why_unserved(message: Message) -> str:
    if message.name == UNKNOWN_REQUEST:
        return f"request number {message.number} does not exist"
    return "belongs to a feature that this back-end does not offer"
