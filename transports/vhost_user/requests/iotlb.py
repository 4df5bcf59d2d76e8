"""Translations of a virtual IOMMU ("IOMMU support"). The questions are the back-end's (``serving.backend_channel``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from transports.base import BackendLike
from transports.vhost_user.requests.operation import U64_MAX, Answer, Operation, Refuse, Value
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame
from transports.vhost_user.wire.message import Message, Payload, Reply
from transports.vhost_user.wire.numbers import VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_UPDATE
from virtio.errors import PeerError
from virtio.waist import Permission

_EVERYTHING: Final = U64_MAX  # bytes, from address 0: the most that a 64-bit size can say


class IotlbRequest:
    # Acknowledged always, whether or not REPLY_ACK was negotiated ("VHOST_USER_IOTLB_MSG").
    message: ClassVar = Message(22, "VHOST_USER_IOTLB_MSG", Payload.IOTLB, reply=Reply.ALWAYS_STATUS)

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        message = payloads.parse_iotlb(frame.payload)
        if not state.has_used_iotlb:
            raise PeerError(
                "VIRTIO_F_ACCESS_PLATFORM and VHOST_USER_PROTOCOL_F_BACKEND_REQ were not both negotiated: "
                "nothing is translated"
            )
        if not state.translates:
            # The late answer to a miss from before the device was stopped. No front-end would invalidate it any more.
            return Answer()
        if message.type == VHOST_IOTLB_UPDATE:
            return _plan_update(state, message)
        if message.type == VHOST_IOTLB_INVALIDATE:
            # QEMU counts a size in 64 bits: an invalidation of the whole address space arrives as size 0.
            size = message.size or U64_MAX - message.iova
            if message.iova + size - 1 > U64_MAX:
                raise PeerError(f"{message.size:#x} bytes at I/O address {message.iova:#x} are no range")
            return IotlbInvalidate(message.iova, size)
        raise PeerError(f"IOTLB message type {message.type} is not for a front-end to send")


def _plan_update(state: ConnectionState, message: payloads.IotlbMessage) -> Operation:
    if message.perm > int(Permission.READ | Permission.WRITE):
        raise PeerError(f"unknown permissions {message.perm:#x}")
    if message.size == 0 or max(message.iova, message.uva) + message.size - 1 > U64_MAX:
        raise PeerError(f"{message.size:#x} bytes at I/O address {message.iova:#x} are no range")
    if not state.memory.holds(message.uva, message.size):
        return Refuse(f"{message.size:#x} bytes at user address {message.uva:#x} lie outside the shared memory")
    return IotlbUpdate(message.iova, message.size, message.uva, message.perm)


@dataclass(frozen=True, slots=True)
class IotlbUpdate(Operation):
    iova: int
    size: int
    uva: int
    perm: int

    async def perform(self, backend: BackendLike) -> Value:
        await backend.iotlb_update(self.iova, self.size, self.uva, self.perm)
        return 0


@dataclass(frozen=True, slots=True)
class IotlbInvalidate(Operation):
    iova: int
    size: int

    async def perform(self, backend: BackendLike) -> Value:
        await backend.iotlb_invalidate(self.iova, self.size)
        return 0


async def forget_all(backend: BackendLike) -> None:
    """When the last ring stops: a front-end invalidates nothing while all are stopped."""
    await backend.iotlb_invalidate(0, _EVERYTHING)
