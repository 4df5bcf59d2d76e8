"""The rings: size, addresses, base, kick, call and err, enabling and stopping. Their states: ``state.vring``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transports.base import BackendLike
from transports.vhost_user.requests import iotlb
from transports.vhost_user.requests.operation import Operation, Refuse, Value
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.state.vring import Parameter, Vring
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame
from transports.vhost_user.wire.message import NO_OR_ONE_FD, Message, Payload, Reply
from transports.vhost_user.wire.numbers import (
    VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    VHOST_USER_VRING_IDX_MASK,
)
from virtio.errors import PeerError
from virtio.fd import OwnedFd
from virtio.spec import VIRTQUEUE_SIZE_MAX


class NoSuchQueueError(Exception):
    """One that a device of this protocol may have, and this device has not."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__(f"queue {index} does not exist; the device has {count}")
        self.index = index


def _ring(state: ConnectionState, index: int) -> Vring:
    if index > VHOST_USER_VRING_IDX_MASK:
        raise PeerError(f"queue {index} does not exist; a device has {VHOST_USER_VRING_IDX_MASK + 1} at most")
    if index >= len(state.rings):
        raise NoSuchQueueError(index, len(state.rings))
    return state.rings[index]


# --- what a ring is ---


class _Change(Operation):
    """Drains a ring that the back-end has (``suspend``), and is done with its base as value."""

    __slots__ = ()
    index: int
    suspend: bool

    async def perform(self, backend: BackendLike) -> Value:
        return await backend.suspend_queue(self.index) if self.suspend else 0


@dataclass(frozen=True, slots=True)
class SetRingSize(_Change):
    message: ClassVar = Message(8, "VHOST_USER_SET_VRING_NUM", Payload.VRING_STATE)

    index: int
    size: int
    suspend: bool = False

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        """Which sizes the ring's format can have is asked when it starts."""
        ring_state = payloads.parse_vring_state(frame.payload)
        ring = _ring(state, ring_state.index)
        size = ring_state.num
        if size == 0:
            raise PeerError(f"queue {ring.index} cannot have the size 0")
        if size > VIRTQUEUE_SIZE_MAX:
            raise PeerError(f"queue {ring.index}: size {size} is above {VIRTQUEUE_SIZE_MAX} (virtio 1.3, section 2.7)")
        if size > state.queue_size_max:
            # Without NEED_REPLY this ends the connection: the guest is about to use this ring, and would wait for ever.
            return Refuse(
                f"queue {ring.index}: size {size} is above this device's limit of {state.queue_size_max}; "
                f"lower the queue size in the virtual machine or raise the device's queue_size"
            )
        return cls(ring.index, size, suspend=ring.configured and size != ring.size)

    def commit(self, state: ConnectionState, value: Value) -> None:
        ring = state.rings[self.index]
        _note_base(ring, value, suspended=self.suspend)
        ring.size = self.size
        ring.say(Parameter.SIZE, suspended=self.suspend)


@dataclass(frozen=True, slots=True)
class SetRingAddresses(_Change):
    """The same addresses again are no change, also while the ring runs."""

    message: ClassVar = Message(9, "VHOST_USER_SET_VRING_ADDR", Payload.VRING_ADDR)

    index: int
    desc: int
    avail: int
    used: int
    suspend: bool = False

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        addr = payloads.parse_vring_addr(frame.payload)
        ring = _ring(state, addr.index)
        if addr.flags:  # VHOST_VRING_F_LOG is for VHOST_F_LOG_ALL, which is not offered
            raise PeerError(f"queue {ring.index}: ring flags {addr.flags:#x} were not negotiated")
        addresses = (addr.desc, addr.avail, addr.used)
        return cls(ring.index, *addresses, suspend=ring.configured and addresses != ring.addresses)

    def commit(self, state: ConnectionState, value: Value) -> None:
        ring = state.rings[self.index]
        _note_base(ring, value, suspended=self.suspend)
        ring.addresses = (self.desc, self.avail, self.used)
        ring.say(Parameter.ADDRESSES, suspended=self.suspend)


@dataclass(frozen=True, slots=True)
class SetRingBase(_Change):
    """Whatever the ring has done meanwhile, it starts there.

    The base that a packed ring of an enabled queue was given already is no change. A split ring's is: where another
    ring is at the same place the base is right, and where it is the same ring its used index tells so.
    """

    message: ClassVar = Message(10, "VHOST_USER_SET_VRING_BASE", Payload.VRING_STATE)

    index: int
    base: int
    suspend: bool = False

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        ring_state = payloads.parse_vring_state(frame.payload)
        ring = _ring(state, ring_state.index)
        same = state.is_packed and ring.enabled and ring_state.num == ring.base
        return cls(ring.index, ring_state.num, suspend=ring.configured and not same)

    def commit(self, state: ConnectionState, value: Value) -> None:
        ring = state.rings[self.index]
        ring.base = self.base
        ring.say(Parameter.BASE, suspended=self.suspend)


def _note_base(ring: Vring, value: Value, *, suspended: bool) -> None:
    """Where a ring stood that was suspended, unless its new base has come before the rest of the change."""
    if suspended and Parameter.BASE not in ring.said:
        assert isinstance(value, int)
        ring.base = value


# --- what a ring does ---


@dataclass(frozen=True, slots=True)
class SetKick(Operation):
    """``kick_fd`` None = poll the ring; ``enable``: a ring without F_PROTOCOL_FEATURES starts in the enabled state."""

    message: ClassVar = Message(12, "VHOST_USER_SET_VRING_KICK", Payload.VRING_FD, fds=NO_OR_ONE_FD)

    index: int
    kick_fd: OwnedFd | None
    enable: bool = False

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        ring, kick_fd = _ring_and_fd(state, frame)
        return cls(ring.index, kick_fd, enable=state.starts_enabled and not ring.enabled)

    async def perform(self, backend: BackendLike) -> Value:
        if self.enable:
            await backend.enable_queue(self.index, True)
        await backend.set_kick(self.index, self.kick_fd)
        return 0

    def commit(self, state: ConnectionState, value: Value) -> None:
        ring = state.rings[self.index]
        ring.enabled |= self.enable
        ring.kick()

    @property
    def fds(self) -> tuple[OwnedFd, ...]:
        return _carried(self.kick_fd)


@dataclass(frozen=True, slots=True)
class KickQueue(Operation):
    """A kick by message; the first one starts the ring, as a kick by a descriptor does ("Ring states").

    Not for the device: the connection itself has the ring's eventfd, and performs this.
    """

    message: ClassVar = Message(
        35, "VHOST_USER_VRING_KICK", Payload.VRING_STATE, feature=VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS
    )

    index: int

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        ring = _ring(state, payloads.parse_vring_state(frame.payload).index)
        if ring.started:
            return cls(ring.index)
        return SetKick(ring.index, None, enable=state.starts_enabled and not ring.enabled)

    async def perform(self, backend: BackendLike) -> Value:
        raise TypeError(f"{self.message.name} is the connection's")


@dataclass(frozen=True, slots=True)
class SetCall(Operation):
    message: ClassVar = Message(13, "VHOST_USER_SET_VRING_CALL", Payload.VRING_FD, fds=NO_OR_ONE_FD)

    index: int
    call_fd: OwnedFd | None

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        ring, call_fd = _ring_and_fd(state, frame)
        return cls(ring.index, call_fd)

    async def perform(self, backend: BackendLike) -> Value:
        await backend.set_call(self.index, self.call_fd)
        return 0

    def commit(self, state: ConnectionState, value: Value) -> None:
        state.rings[self.index].has_call = self.call_fd is not None

    @property
    def fds(self) -> tuple[OwnedFd, ...]:
        return _carried(self.call_fd)


@dataclass(frozen=True, slots=True)
class SetErr(Operation):
    message: ClassVar = Message(14, "VHOST_USER_SET_VRING_ERR", Payload.VRING_FD, fds=NO_OR_ONE_FD)

    index: int
    err_fd: OwnedFd | None

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        ring, err_fd = _ring_and_fd(state, frame)
        return cls(ring.index, err_fd)

    async def perform(self, backend: BackendLike) -> Value:
        await backend.set_err(self.index, self.err_fd)
        return 0

    def commit(self, state: ConnectionState, value: Value) -> None:
        state.rings[self.index].has_err = self.err_fd is not None

    @property
    def fds(self) -> tuple[OwnedFd, ...]:
        return _carried(self.err_fd)


@dataclass(frozen=True, slots=True)
class EnableQueue(Operation):
    message: ClassVar = Message(18, "VHOST_USER_SET_VRING_ENABLE", Payload.VRING_STATE)

    index: int
    on: bool

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        ring_state = payloads.parse_vring_state(frame.payload)
        return cls(_ring(state, ring_state.index).index, bool(ring_state.num))

    async def perform(self, backend: BackendLike) -> Value:
        await backend.enable_queue(self.index, self.on)
        return 0

    def commit(self, state: ConnectionState, value: Value) -> None:
        state.rings[self.index].enable(self.on)


@dataclass(frozen=True, slots=True)
class StopQueue(Operation):
    """Done with the ring's base as value; ``base`` is that value already when the back-end does not have the ring.

    ``started``: the back-end has its descriptors. ``flush_iotlb``: it is the last ring that runs.
    """

    message: ClassVar = Message(
        11, "VHOST_USER_GET_VRING_BASE", Payload.VRING_STATE, reply=Reply.ALWAYS, answer=Payload.VRING_STATE
    )

    index: int
    base: int | None
    started: bool = True
    flush_iotlb: bool = False

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        ring = _ring(state, payloads.parse_vring_state(frame.payload).index)
        is_last = state.running == (ring.index,)
        return cls(
            ring.index,
            None if ring.configured else ring.current_base(packed=state.is_packed),
            started=ring.started,
            flush_iotlb=is_last and state.translates,
        )

    async def perform(self, backend: BackendLike) -> Value:
        stood_at = await backend.stop_queue(self.index) if self.started else 0
        if self.flush_iotlb:
            await iotlb.forget_all(backend)
        return stood_at if self.base is None else self.base

    def commit(self, state: ConnectionState, value: Value) -> None:
        assert isinstance(value, int)
        state.rings[self.index].stop(value)

    def answer(self, value: Value) -> bytes:
        assert isinstance(value, int)
        return payloads.build_vring_state(self.index, value)


def _ring_and_fd(state: ConnectionState, frame: Frame) -> tuple[Vring, OwnedFd | None]:
    vring_fd = payloads.parse_vring_fd(frame.payload)
    if vring_fd.reserved:
        raise PeerError(f"reserved bits {vring_fd.reserved:#x} are set")
    ring = _ring(state, vring_fd.index)
    if vring_fd.has_fd and not frame.fds:
        raise PeerError("announces a file descriptor and brings none")
    return ring, frame.fds[0] if vring_fd.has_fd else None


def _carried(fd: OwnedFd | None) -> tuple[OwnedFd, ...]:
    return () if fd is None else (fd,)
