"""The device as a whole: its status, its reset, the channel on which the back-end asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transports.base import BackendLike
from transports.vhost_user.requests import iotlb
from transports.vhost_user.requests.operation import Operation, Value
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame
from transports.vhost_user.wire.message import ONE_FD, Message, Payload, Reply
from transports.vhost_user.wire.numbers import (
    VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_STATUS,
)
from virtio.errors import PeerError
from virtio.fd import OwnedFd


@dataclass(frozen=True, slots=True)
class SetStatus(Operation):
    """A device status other than 0, which is ``StopDevice``."""

    message: ClassVar = Message(39, "VHOST_USER_SET_STATUS", Payload.U64, feature=VHOST_USER_PROTOCOL_F_STATUS)

    status: int

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        status = payloads.parse_u64(frame.payload)
        if status > 0xFF:
            raise PeerError(f"{status:#x} is no device status (virtio 1.3, section 2.1)")
        if status:
            return cls(status)
        return StopDevice(state.running, flush_iotlb=state.translates)

    async def perform(self, backend: BackendLike) -> Value:
        backend.set_status(self.status)
        return 0


@dataclass(frozen=True, slots=True)
class StopDevice(Operation):
    """Device status 0: all rings stop, translations are forgotten, features must be negotiated again.

    It is no reset of the device: QEMU sends it also when the virtual machine is only paused, before
    it asks for the rings' bases, and a guest that goes on must find bases and device as they were.
    Done with the base of each queue in ``running`` as value.
    """

    running: tuple[int, ...]
    flush_iotlb: bool

    async def perform(self, backend: BackendLike) -> Value:
        bases = {index: await backend.stop_queue(index) for index in self.running}
        if self.flush_iotlb:
            await iotlb.forget_all(backend)
        backend.set_status(0)
        return bases

    def commit(self, state: ConnectionState, value: Value) -> None:
        assert isinstance(value, dict)
        state.features = None
        for index in self.running:
            ring = state.rings[index]
            ring.stop(value[index] if ring.configured else None)


@dataclass(frozen=True, slots=True)
class GetStatus(Operation):
    """Done with the device status as value."""

    message: ClassVar = Message(
        40, "VHOST_USER_GET_STATUS", Payload.NOTHING, reply=Reply.ALWAYS, feature=VHOST_USER_PROTOCOL_F_STATUS
    )

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls()

    async def perform(self, backend: BackendLike) -> Value:
        return backend.status


@dataclass(frozen=True, slots=True)
class ResetDevice(Operation):
    """The device forgets everything but the memory, which belongs to the connection."""

    message: ClassVar = Message(
        34, "VHOST_USER_RESET_DEVICE", Payload.NOTHING, feature=VHOST_USER_PROTOCOL_F_RESET_DEVICE
    )

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls()

    async def perform(self, backend: BackendLike) -> Value:
        await backend.reset(keep_memory=True)
        return 0

    def commit(self, state: ConnectionState, value: Value) -> None:
        state.features = None
        for ring in state.rings:
            ring.reset()


@dataclass(frozen=True, slots=True)
class SetBackendChannel(Operation):
    """Not for the device: the connection itself uses the socket, and performs this."""

    message: ClassVar = Message(
        21,
        "VHOST_USER_SET_BACKEND_REQ_FD",
        Payload.NOTHING,
        fds=ONE_FD,
        feature=VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    )

    fd: OwnedFd

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls(frame.fds[0])

    async def perform(self, backend: BackendLike) -> Value:
        raise TypeError(f"{self.message.name} is the connection's")

    @property
    def fds(self) -> tuple[OwnedFd, ...]:
        return (self.fd,)
