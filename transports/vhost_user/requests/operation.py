"""What all requests share: the class an operation is of, a plain answer, a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

from transports.base import BackendLike
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame
from transports.vhost_user.wire.message import Message
from virtio.errors import PeerError
from virtio.fd import OwnedFd

U64_MAX: Final = 2**64 - 1

Value = int | bytes | dict[int, int]
"""What an operation can be done with."""


class Operation:
    """What a valid request asks of the back-end: a plain value. Planning changes nothing, ``commit`` does.

    Without more an operation has nothing to do, leaves no trace, and is answered by a u64.
    """

    __slots__ = ()

    async def perform(self, backend: BackendLike) -> Value:
        """Do what is asked; the value it is done with. Called once, by the connection, before ``commit``.

        ``PeerError`` and ``HostError`` mean that it was not done. Every descriptor of the operation has gone to the
        back-end or is closed when this returns or raises.
        """
        return 0

    def commit(self, state: ConnectionState, value: Value) -> None:
        """The operation is done with ``value``. Called by the session; never after ``perform`` has raised."""

    def answer(self, value: Value) -> bytes:
        """The payload of the reply, where the request has one of its own (``Reply.ALWAYS``)."""
        assert isinstance(value, int)
        return payloads.build_u64(value)

    @property
    def fds(self) -> tuple[OwnedFd, ...]:
        """The descriptors the operation carries, also those a memory table already had.

        The one who carries the operation out owns those it brought.
        """
        return ()


class RequestType(Protocol):
    """A class of ``table.REQUESTS``."""

    message: ClassVar[Message]

    @classmethod
    def plan(cls, state: ConnectionState, frame: Frame) -> Operation:
        """What a whole message of this kind asks for in this state. Changes nothing.

        ``PeerError`` (the session adds the request's name) for what a front-end must not send; ``Refuse`` is answered
        for what it may send and cannot have.
        """


@dataclass(frozen=True, slots=True)
class Request:
    """One valid request and what it asks for."""

    message: Message
    need_reply: bool
    operation: Operation

    @property
    def name(self) -> str:
        return self.message.name

    @property
    def fds(self) -> tuple[OwnedFd, ...]:
        return self.operation.fds


@dataclass(frozen=True, slots=True)
class Answer(Operation):
    """Nothing to do: the session knows the answer (0 where the request has none)."""

    value: int = 0

    async def perform(self, backend: BackendLike) -> Value:
        return self.value


@dataclass(frozen=True, slots=True)
class Refuse(Operation):
    """A well-formed request that cannot be granted; refused without ending the connection, if the wire can say so.

    ``missing_queue``: it is about a queue that the device does not have. That ends no connection where the wire cannot
    say so either: front-ends prepare every queue of their machine (DPDK's virtio-user does not ask how many there are),
    and as long as the guest uses none of these nothing is missed. qemu-storage-daemon ends there, DPDK's back-end makes
    the queue; here it is just not served.
    """

    reason: str
    missing_queue: int | None = None

    async def perform(self, backend: BackendLike) -> Value:
        raise PeerError(self.reason)
