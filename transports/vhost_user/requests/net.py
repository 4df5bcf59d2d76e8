"""What only network interfaces have: the MTU, and the announcement after a migration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transports.base import BackendLike
from transports.vhost_user.requests.operation import Operation, Value
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame
from transports.vhost_user.wire.message import Message, Payload
from transports.vhost_user.wire.numbers import VHOST_USER_PROTOCOL_F_NET_MTU, VHOST_USER_PROTOCOL_F_RARP


@dataclass(frozen=True, slots=True)
class SetMtu(Operation):
    message: ClassVar = Message(20, "VHOST_USER_NET_SET_MTU", Payload.U64, feature=VHOST_USER_PROTOCOL_F_NET_MTU)

    mtu: int

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls(payloads.parse_u64(frame.payload))

    async def perform(self, backend: BackendLike) -> Value:
        backend.set_mtu(self.mtu)
        return 0


@dataclass(frozen=True, slots=True)
class Announce(Operation):
    """Tell the network behind the device that the station with this address, of 6 bytes, is here now."""

    message: ClassVar = Message(19, "VHOST_USER_SEND_RARP", Payload.U64, feature=VHOST_USER_PROTOCOL_F_RARP)

    address: bytes

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls(frame.payload[:6])  # of the u64 its first 6 bytes in memory are the address

    async def perform(self, backend: BackendLike) -> Value:
        await backend.announce(self.address)
        return 0
