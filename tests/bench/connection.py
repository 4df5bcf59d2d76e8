"""The front-end's end of a vhost-user socket: numbers, payloads and one request at a time.

Written from the protocol text and on purpose without the daemon's own tables: two independent readings must agree.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

VHOST_USER_VERSION: Final = 0x1
VHOST_USER_REPLY_MASK: Final = 0x4
VHOST_USER_NEED_REPLY_MASK: Final = 0x8

VHOST_USER_GET_FEATURES: Final = 1
VHOST_USER_SET_FEATURES: Final = 2
VHOST_USER_SET_OWNER: Final = 3
VHOST_USER_SET_MEM_TABLE: Final = 5
VHOST_USER_SET_VRING_NUM: Final = 8
VHOST_USER_SET_VRING_ADDR: Final = 9
VHOST_USER_SET_VRING_BASE: Final = 10
VHOST_USER_GET_VRING_BASE: Final = 11
VHOST_USER_SET_VRING_KICK: Final = 12
VHOST_USER_SET_VRING_CALL: Final = 13
VHOST_USER_GET_PROTOCOL_FEATURES: Final = 15
VHOST_USER_SET_PROTOCOL_FEATURES: Final = 16
VHOST_USER_GET_QUEUE_NUM: Final = 17
VHOST_USER_SET_VRING_ENABLE: Final = 18
VHOST_USER_GET_CONFIG: Final = 24

VHOST_USER_F_PROTOCOL_FEATURES: Final = 30
VHOST_USER_PROTOCOL_F_MQ: Final = 0
VHOST_USER_PROTOCOL_F_REPLY_ACK: Final = 3
VHOST_USER_PROTOCOL_F_CONFIG: Final = 9

HEADER: Final = struct.Struct("=III")
U64: Final = struct.Struct("=Q")
VRING_STATE: Final = struct.Struct("=II")
VRING_ADDR: Final = struct.Struct("=IIQQQQ")
MEMORY_HEADER: Final = struct.Struct("=II")
MEMORY_REGION: Final = struct.Struct("=QQQQ")
CONFIG_HEADER: Final = struct.Struct("=III")


class ConnectionFailedError(Exception):
    """The back-end refused a request, answered something else, or went away."""


class Connection:
    """A vhost-user connection from the front-end's side; blocking, with a time limit for every answer.

    Once ``VHOST_USER_PROTOCOL_F_REPLY_ACK`` is negotiated, ``set`` asks for an acknowledgement of each message,
    so that a refusal is seen at the message that caused it.
    """

    def __init__(self, path: Path, timeout: float = 10.0) -> None:
        self.path = path
        self.acknowledged = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise ConnectionFailedError(f"{path}: nobody answers on the vhost-user socket: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the back-end stops its queues."""
        self._socket.close()

    def get(self, request: int, payload: bytes = b"") -> bytes:
        """Send ``request`` and return the payload of its reply."""
        self._send(request, payload, (), 0)
        return self._receive(request)

    def get_u64(self, request: int) -> int:
        """Send ``request`` and return the number it is answered by."""
        payload = self.get(request)
        if len(payload) != U64.size:
            raise ConnectionFailedError(
                f"{self.path}: request {request} was answered by {len(payload)} bytes, not by 8"
            )
        return int(U64.unpack(payload)[0])

    def set(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send ``request``, and wait for its acknowledgement when REPLY_ACK is negotiated. The fds stay ours."""
        self._send(request, payload, fds, VHOST_USER_NEED_REPLY_MASK if self.acknowledged else 0)
        if self.acknowledged:
            (result,) = U64.unpack(self._receive(request))
            if result:
                raise ConnectionFailedError(f"{self.path}: the back-end refused request {request} (answer {result})")

    def _send(self, request: int, payload: bytes, fds: Sequence[int], flags: int) -> None:
        data = HEADER.pack(request, VHOST_USER_VERSION | flags, len(payload)) + payload
        try:
            sent = socket.send_fds(self._socket, [data], list(fds)) if fds else self._socket.send(data)
        except OSError as error:
            raise ConnectionFailedError(f"{self.path}: request {request} could not be sent: {error}") from error
        if sent != len(data):
            raise ConnectionFailedError(f"{self.path}: request {request} was sent in part only")

    def _receive(self, request: int) -> bytes:
        answered, flags, size = HEADER.unpack(self._read(HEADER.size, request))
        if answered != request or not flags & VHOST_USER_REPLY_MASK:
            raise ConnectionFailedError(f"{self.path}: request {request} was answered by {answered}, flags {flags:#x}")
        return self._read(size, request)

    def _read(self, size: int, request: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self._socket.recv(size - len(data))
            except OSError as error:
                raise ConnectionFailedError(f"{self.path}: no answer to request {request}: {error}") from error
            if not part:
                raise ConnectionFailedError(f"{self.path}: the back-end closed the connection at request {request}")
            data += part
        return data
