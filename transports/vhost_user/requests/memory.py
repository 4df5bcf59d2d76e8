"""The memory that the front-end shares: all of it, one region more, one less. Its rules: ``state.memory_table``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transports.base import BackendLike
from transports.vhost_user.requests.operation import Answer, Operation, Refuse, Value
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame
from transports.vhost_user.wire.message import NO_OR_ONE_FD, ONE_FD, Message, Payload, Reply
from transports.vhost_user.wire.numbers import (
    VHOST_MEMORY_MAX_NREGIONS,
    VHOST_USER_MAX_RAM_SLOTS,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
)
from virtio.fd import OwnedFd
from virtio.waist import MemoryRegion


@dataclass(frozen=True, slots=True)
class SetMemory(Operation):
    """The whole new memory table; regions that stay are the same objects as before."""

    message: ClassVar = Message(
        5, "VHOST_USER_SET_MEM_TABLE", Payload.MEMORY_TABLE, fds=range(VHOST_MEMORY_MAX_NREGIONS + 1)
    )

    regions: tuple[MemoryRegion, ...]

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls(state.memory.with_all(payloads.parse_memory_table(frame.payload), frame.fds))

    async def perform(self, backend: BackendLike) -> Value:
        await backend.set_memory(self.regions)
        return 0

    def commit(self, state: ConnectionState, value: Value) -> None:
        state.memory.regions = self.regions

    @property
    def fds(self) -> tuple[OwnedFd, ...]:
        return tuple(region.fd for region in self.regions)


@dataclass(frozen=True, slots=True)
class AddRegion(SetMemory):
    message: ClassVar = Message(
        37,
        "VHOST_USER_ADD_MEM_REG",
        Payload.MEMORY_REGION,
        fds=ONE_FD,
        feature=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    )

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        description = payloads.parse_memory_region(frame.payload)
        if state.memory.has(description, frame.fds[0]):
            return Answer()
        regions = state.memory.with_added(description, frame.fds[0])
        if len(regions) > VHOST_USER_MAX_RAM_SLOTS:
            return Refuse(f"all {VHOST_USER_MAX_RAM_SLOTS} memory slots are taken")
        return cls(regions)


@dataclass(frozen=True, slots=True)
class RemoveRegion(SetMemory):
    # A descriptor is not needed here; one is tolerated and closed unused ("VHOST_USER_REM_MEM_REG").
    message: ClassVar = Message(
        38,
        "VHOST_USER_REM_MEM_REG",
        Payload.MEMORY_REGION,
        fds=NO_OR_ONE_FD,
        feature=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    )

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        description = payloads.parse_memory_region(frame.payload)
        regions = state.memory.with_removed(description)
        if regions is None and state.repeats_memory:
            return Answer()
        if regions is None:
            return Refuse(f"there is no memory region of {description.size:#x} bytes at {description.gpa:#x}")
        return cls(regions)


@dataclass(frozen=True, slots=True)
class GetMaxMemorySlots(Answer):
    message: ClassVar = Message(
        36,
        "VHOST_USER_GET_MAX_MEM_SLOTS",
        Payload.NOTHING,
        reply=Reply.ALWAYS,
        feature=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    )

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        return cls(VHOST_USER_MAX_RAM_SLOTS)
