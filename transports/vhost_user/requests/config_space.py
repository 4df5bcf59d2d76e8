"""The device's config space, read and written by the front-end ("VHOST_USER_GET_CONFIG", "VHOST_USER_SET_CONFIG")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transports.base import BackendLike
from transports.vhost_user.requests.operation import Operation, Refuse, Value
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame
from transports.vhost_user.wire.message import Message, Payload, Reply
from transports.vhost_user.wire.numbers import (
    VHOST_SET_CONFIG_TYPE_FRONTEND,
    VHOST_SET_CONFIG_TYPE_MIGRATION,
    VHOST_USER_MAX_CONFIG_SIZE,
    VHOST_USER_PROTOCOL_F_CONFIG,
)
from virtio.errors import PeerError


@dataclass(frozen=True, slots=True)
class ReadConfig(Operation):
    """Done with the bytes read as value; ``flags`` go back unchanged."""

    message: ClassVar = Message(
        24,
        "VHOST_USER_GET_CONFIG",
        Payload.CONFIG,
        reply=Reply.ALWAYS,
        answer=Payload.CONFIG,
        feature=VHOST_USER_PROTOCOL_F_CONFIG,
    )

    offset: int
    size: int
    flags: int

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        access = payloads.parse_config(frame.payload, to_read=True)
        if reason := _fault(access):
            return Refuse(reason)
        return cls(access.offset, len(access.data), access.flags)

    async def perform(self, backend: BackendLike) -> Value:
        return backend.read_config(self.offset, self.size)

    def answer(self, value: Value) -> bytes:
        assert isinstance(value, bytes)
        return payloads.build_config(payloads.ConfigAccess(self.offset, self.flags, value))


@dataclass(frozen=True, slots=True)
class WriteConfig(Operation):
    message: ClassVar = Message(25, "VHOST_USER_SET_CONFIG", Payload.CONFIG, feature=VHOST_USER_PROTOCOL_F_CONFIG)

    offset: int
    data: bytes

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        access = payloads.parse_config(frame.payload, to_read=False)
        if access.flags not in (VHOST_SET_CONFIG_TYPE_FRONTEND, VHOST_SET_CONFIG_TYPE_MIGRATION):
            raise PeerError(f"unknown flags {access.flags:#x}")
        if reason := _fault(access):
            return Refuse(reason)
        return cls(access.offset, access.data)

    async def perform(self, backend: BackendLike) -> Value:
        backend.write_config(self.offset, self.data)
        return 0


def _fault(access: payloads.ConfigAccess) -> str | None:
    if not access.data:
        return "an access to the config space of 0 bytes"
    if access.offset + len(access.data) > VHOST_USER_MAX_CONFIG_SIZE:
        return f"{len(access.data)} bytes at offset {access.offset} lie beyond the config space"
    return None
