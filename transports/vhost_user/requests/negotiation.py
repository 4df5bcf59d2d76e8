"""What both sides can do: virtio features, protocol features, the owner, the number of queues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final

from transports.base import BackendLike
from transports.vhost_user.requests.operation import Answer, Operation, Value
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame
from transports.vhost_user.wire.message import Message, Payload, Reply
from transports.vhost_user.wire.numbers import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_CONFIG,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_NET_MTU,
    VHOST_USER_PROTOCOL_F_RARP,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_STATUS,
)
from virtio.errors import PeerError
from virtio.spec import VIRTIO_F_RING_RESET

NEVER_OFFERED: Final = 1 << VIRTIO_F_RING_RESET
"""Virtio features that this transport cannot carry. No message tells a back-end that the driver reset one ring (seen:
QEMU 7.2 to 11.1 let the driver do it, and send nothing): the device would write into memory that is a ring no more."""

PROTOCOL_FEATURES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "VHOST_USER_PROTOCOL_F_MQ": VHOST_USER_PROTOCOL_F_MQ,
        "VHOST_USER_PROTOCOL_F_RARP": VHOST_USER_PROTOCOL_F_RARP,
        "VHOST_USER_PROTOCOL_F_REPLY_ACK": VHOST_USER_PROTOCOL_F_REPLY_ACK,
        "VHOST_USER_PROTOCOL_F_NET_MTU": VHOST_USER_PROTOCOL_F_NET_MTU,
        "VHOST_USER_PROTOCOL_F_BACKEND_REQ": VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        "VHOST_USER_PROTOCOL_F_CONFIG": VHOST_USER_PROTOCOL_F_CONFIG,
        "VHOST_USER_PROTOCOL_F_RESET_DEVICE": VHOST_USER_PROTOCOL_F_RESET_DEVICE,
        "VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS": VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
        "VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS": VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
        "VHOST_USER_PROTOCOL_F_STATUS": VHOST_USER_PROTOCOL_F_STATUS,
    }
)
"""What this back-end offers, by name. A bit is here only when everything it promises is implemented:
QEMU acknowledges any bit it has a number for, also bits it does not honour afterwards."""

OFFERED_PROTOCOL_FEATURES: Final = sum(1 << bit for bit in PROTOCOL_FEATURES.values())


_OF_NETWORK_INTERFACES: Final = 1 << VHOST_USER_PROTOCOL_F_RARP | 1 << VHOST_USER_PROTOCOL_F_NET_MTU


def offered_protocol_features(
    *, has_config_space: bool, is_network_interface: bool, inband_notifications: bool = False
) -> int:
    """The protocol features of a device; QEMU warns of CONFIG where it expects no config space (rng).

    In-band notifications only where they are asked for: QEMU acknowledges the bit and knows none of the messages.
    """
    withheld = 0 if has_config_space else 1 << VHOST_USER_PROTOCOL_F_CONFIG
    if not is_network_interface:
        withheld |= _OF_NETWORK_INTERFACES
    if not inband_notifications:
        withheld |= 1 << VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS
    return OFFERED_PROTOCOL_FEATURES & ~withheld


_INBAND: Final = 1 << VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS
_BACKEND_REQ: Final = 1 << VHOST_USER_PROTOCOL_F_BACKEND_REQ
_INBAND_NEEDS: Final = _BACKEND_REQ | 1 << VHOST_USER_PROTOCOL_F_REPLY_ACK


@dataclass(frozen=True, slots=True)
class GetFeatures(Answer):
    message: ClassVar = Message(1, "VHOST_USER_GET_FEATURES", Payload.NOTHING, reply=Reply.ALWAYS)

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls(state.offered_features)


@dataclass(frozen=True, slots=True)
class SetFeatures(Operation):
    """``bits`` as received; ``enable_all``: the rings are enabled at once, F_PROTOCOL_FEATURES was not set.

    The rings in ``suspend`` are drained and let go of first: they run by other bits. Done with their bases as value.
    """

    message: ClassVar = Message(2, "VHOST_USER_SET_FEATURES", Payload.U64)

    bits: int
    enable_all: bool
    suspend: tuple[int, ...] = ()

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        # QEMU 7.2's vhost-user-input passes on what the guest accepted of QEMU's own offer, also what we never offer.
        bits = payloads.parse_u64(frame.payload) & ~NEVER_OFFERED
        if extra := bits & ~state.offered_features:
            raise PeerError(f"feature bits {_bit_list(extra)} were not offered")
        # The same again changes nothing: QEMU repeats it for each queue pair of a network device.
        suspend = tuple(ring.index for ring in state.rings if ring.configured) if bits != state.features else ()
        return cls(bits, enable_all=not bits >> VHOST_USER_F_PROTOCOL_FEATURES & 1, suspend=suspend)

    async def perform(self, backend: BackendLike) -> Value:
        bases = {index: await backend.suspend_queue(index) for index in self.suspend}
        backend.set_driver_features(self.bits & ~(1 << VHOST_USER_F_PROTOCOL_FEATURES))
        if self.enable_all:
            await _enable_all(backend, True)
        return bases

    def commit(self, state: ConnectionState, value: Value) -> None:
        before = state.is_packed, state.ring_space
        state.features = self.bits
        state.has_used_iotlb |= state.translates
        # A ring of another format or in another space is another ring: it waits for the front-end's word.
        is_other = before != (state.is_packed, state.ring_space)
        for index in self.suspend:
            assert isinstance(value, dict)
            ring = state.rings[index]
            ring.base = None if is_other else value[index]
            ring.suspend(held=is_other or not ring.enabled)
        if self.enable_all:
            for ring in state.rings:
                ring.start_enabled()


@dataclass(frozen=True, slots=True)
class GetProtocolFeatures(Answer):
    message: ClassVar = Message(15, "VHOST_USER_GET_PROTOCOL_FEATURES", Payload.NOTHING, reply=Reply.ALWAYS)

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls(state.offered_protocol_features)


@dataclass(frozen=True, slots=True)
class SetProtocolFeatures(Operation):
    message: ClassVar = Message(16, "VHOST_USER_SET_PROTOCOL_FEATURES", Payload.U64)

    bits: int

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        bits = payloads.parse_u64(frame.payload)
        if extra := bits & ~state.offered_protocol_features:
            raise PeerError(f"protocol feature bits {_bit_list(extra)} were not offered")
        if bits & _INBAND and bits & _INBAND_NEEDS != _INBAND_NEEDS:
            # "the back-end should close the connection" (VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
            raise PeerError(
                "VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS needs VHOST_USER_PROTOCOL_F_BACKEND_REQ and "
                "VHOST_USER_PROTOCOL_F_REPLY_ACK"
            )
        if not state.is_suspended and (bits ^ (state.protocol_features or 0)) & (_INBAND | _BACKEND_REQ):
            raise PeerError(
                "how rings are kicked, and whether addresses are translated, cannot change while a ring runs"
            )
        return cls(bits)

    def commit(self, state: ConnectionState, value: Value) -> None:
        state.protocol_features = self.bits
        state.has_used_iotlb |= state.translates


@dataclass(frozen=True, slots=True)
class SetOwner(Operation):
    """The session begins; once more changes nothing."""

    message: ClassVar = Message(3, "VHOST_USER_SET_OWNER", Payload.NOTHING)

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls()

    def commit(self, state: ConnectionState, value: Value) -> None:
        if state.protocol_features is None:
            state.offered_protocol_features |= state.offered_to_owner


@dataclass(frozen=True, slots=True)
class DisableAllQueues(Operation):
    """VHOST_USER_RESET_OWNER, as the text recommends to understand it."""

    message: ClassVar = Message(4, "VHOST_USER_RESET_OWNER", Payload.NOTHING)

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls()

    async def perform(self, backend: BackendLike) -> Value:
        await _enable_all(backend, False)
        return 0

    def commit(self, state: ConnectionState, value: Value) -> None:
        for ring in state.rings:
            ring.enable(False)


@dataclass(frozen=True, slots=True)
class GetQueueNum(Answer):
    message: ClassVar = Message(
        17, "VHOST_USER_GET_QUEUE_NUM", Payload.NOTHING, reply=Reply.ALWAYS, feature=VHOST_USER_PROTOCOL_F_MQ
    )

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls(len(state.rings))


async def _enable_all(backend: BackendLike, on: bool) -> None:
    for index in range(backend.queue_count):
        await backend.enable_queue(index, on)


def _bit_list(bits: int) -> str:
    return ", ".join(str(bit) for bit in range(64) if bits >> bit & 1)
