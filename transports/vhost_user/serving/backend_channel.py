"""The back-end channel: requests of our own, sent to the front-end ("Back-end communication").

``BackendRequests`` builds the requests and understands their replies, without I/O.
``BackendChannel`` moves them over the socket that SET_BACKEND_REQ_FD brought.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

import trio

from transports.vhost_user.wire.numbers import (
    VHOST_IOTLB_MISS,
    VHOST_USER_BACKEND_CONFIG_CHANGE_MSG,
    VHOST_USER_BACKEND_IOTLB_MSG,
    VHOST_USER_BACKEND_VRING_CALL,
    VHOST_USER_BACKEND_VRING_ERR,
    VHOST_USER_NEED_REPLY_MASK,
    VHOST_USER_REPLY_MASK,
    VHOST_USER_VERSION,
    VHOST_USER_VERSION_MASK,
)
from transports.vhost_user.wire.payloads import (
    HEADER_SIZE,
    IotlbMessage,
    build_iotlb,
    build_message,
    build_vring_state,
    parse_header,
    parse_u64,
)
from virtio.errors import PeerError
from virtio.fd import OwnedFd
from virtio.waist import ConfigChanged, IotlbMiss

BACKEND_REQUEST_NAMES: Final = {
    VHOST_USER_BACKEND_IOTLB_MSG: "VHOST_USER_BACKEND_IOTLB_MSG",
    VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG",
    VHOST_USER_BACKEND_VRING_CALL: "VHOST_USER_BACKEND_VRING_CALL",
    VHOST_USER_BACKEND_VRING_ERR: "VHOST_USER_BACKEND_VRING_ERR",
}
_REPLY_SIZE: Final = HEADER_SIZE + 8


@dataclass(frozen=True, slots=True)
class RingCall:
    """The driver of that ring is to be interrupted, in-band."""

    index: int


@dataclass(frozen=True, slots=True)
class RingError:
    """That ring broke, in-band."""

    index: int


BackendEvent = ConfigChanged | IotlbMiss | RingCall | RingError


class BackendRequests:
    """Builds requests, one outstanding at a time, and parses the u64 that acknowledges each.

    ``wants_replies``: VHOST_USER_PROTOCOL_F_REPLY_ACK was negotiated, so each request asks for its
    acknowledgement.
    """

    def __init__(self, *, wants_replies: bool) -> None:
        self.wants_replies = wants_replies
        self._outstanding: int | None = None
        self._buffer = b""

    def build(self, event: BackendEvent) -> bytes:
        """The message that tells the front-end of ``event``."""
        match event:
            case IotlbMiss(iova=iova, perm=perm):
                number = VHOST_USER_BACKEND_IOTLB_MSG
                payload = build_iotlb(IotlbMessage(iova, 0, 0, int(perm), VHOST_IOTLB_MISS))
            case RingCall(index=index):
                number, payload = VHOST_USER_BACKEND_VRING_CALL, build_vring_state(index, 0)
            case RingError(index=index):
                number, payload = VHOST_USER_BACKEND_VRING_ERR, build_vring_state(index, 0)
            case ConfigChanged():
                number, payload = VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, b""
        self._outstanding = number if self.wants_replies else None
        return build_message(number, VHOST_USER_NEED_REPLY_MASK if self.wants_replies else 0, payload)

    @property
    def outstanding(self) -> str | None:
        """The name of the request whose reply is still to come."""
        return None if self._outstanding is None else BACKEND_REQUEST_NAMES[self._outstanding]

    @property
    def wanted_bytes(self) -> int:
        """How many bytes of the outstanding reply are missing."""
        return _REPLY_SIZE - len(self._buffer)

    def stop_asking(self) -> None:
        """No reply is waited for any more, now or later. The one that is late will never be read."""
        self.wants_replies = False
        self._outstanding = None

    def receive(self, data: bytes) -> int | None:
        """Bytes of the reply: the u64 (zero for success) once it is whole, else None.

        ``PeerError`` if it is not the reply to the outstanding request.
        """
        self._buffer += data
        if len(self._buffer) < HEADER_SIZE:
            return None
        header = parse_header(self._buffer)
        name = self.outstanding or "unknown"
        expected = VHOST_USER_VERSION | VHOST_USER_REPLY_MASK
        if header.flags & (VHOST_USER_VERSION_MASK | VHOST_USER_REPLY_MASK) != expected:
            raise PeerError(f"answered with header flags {header.flags:#x}", request=name)
        if header.request != self._outstanding or header.size != _REPLY_SIZE - HEADER_SIZE:
            raise PeerError(f"answered with request {header.request} of {header.size} bytes", request=name)
        if len(self._buffer) < _REPLY_SIZE:
            return None
        result = parse_u64(self._buffer[HEADER_SIZE:_REPLY_SIZE])
        self._buffer = b""
        self._outstanding = None
        return result


class BackendChannel:
    """The socket of the back-end channel; one task may use it at a time.

    Its file status flags are shared with the front-end, which could change them at any time: so they
    are neither set nor relied upon, every call says MSG_DONTWAIT itself.
    """

    def __init__(self, fd: OwnedFd, *, wants_replies: bool) -> None:
        """Takes ``fd``; ``PeerError`` (and ``fd`` closed) unless it is a Unix stream socket."""
        try:
            self._socket = socket.socket(fileno=fd.fileno())
        except OSError:
            fd.close()
            raise PeerError("the file descriptor is no socket") from None
        fd.detach()
        if self._socket.family != socket.AF_UNIX or self._socket.type != socket.SOCK_STREAM:
            self._socket.close()
            raise PeerError("the file descriptor is no Unix stream socket")
        self.requests = BackendRequests(wants_replies=wants_replies)

    async def send(self, event: BackendEvent) -> None:
        """Tell the front-end of ``event``. There is no time limit here.

        ``OSError`` when the front-end closed the channel, ``trio.ClosedResourceError`` when we did meanwhile.
        """
        rest = memoryview(self.requests.build(event))
        while rest:
            try:
                rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
        await trio.lowlevel.checkpoint()

    async def result(self) -> int:
        """The front-end's answer to what was sent, 0 for success; 0 at once if none was asked for.

        Errors as in ``send``, and ``PeerError`` for an answer to something else. No time limit either.
        """
        while self.requests.outstanding is not None:
            try:
                data = self._socket.recv(self.requests.wanted_bytes, socket.MSG_DONTWAIT)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            if not data:
                raise ConnectionResetError("the front-end closed the back-end channel")
            result = self.requests.receive(data)
            if result is not None:
                return result
        await trio.lowlevel.checkpoint()
        return 0

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
