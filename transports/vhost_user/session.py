"""One vhost-user connection, seen from the back-end, without any I/O.

Bytes and descriptors go in (``receive``), valid requests come out one at a time (``next_request``),
and each is answered (``accept`` or ``reject``) before the next is looked at. After each, ``next_start``
gives the rings that have become whole by it. A rule that a message breaks makes it refused, where its
sender can be told; else it is a ``PeerError`` that names the request: after it the session is closed,
and every descriptor received so far is closed with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from transports.vhost_user.requests.negotiation import NEVER_OFFERED, offered_protocol_features
from transports.vhost_user.requests.operation import Refuse, Request, Value
from transports.vhost_user.requests.table import MESSAGES, plan
from transports.vhost_user.state.connection_state import ConnectionState
from transports.vhost_user.state.vring import Vring
from transports.vhost_user.wire import payloads
from transports.vhost_user.wire.framing import Frame, Framer
from transports.vhost_user.wire.message import Payload, Reply
from transports.vhost_user.wire.numbers import VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_PROTOCOL_F_CONFIG
from virtio.errors import HyperbellError, PeerError
from virtio.fd import OwnedFd
from virtio.waist import QueueSetup

_CONFIG: Final = 1 << VHOST_USER_PROTOCOL_F_CONFIG
_FAILURE: Final = 1  # any value but zero ("VHOST_USER_PROTOCOL_F_REPLY_ACK")


@dataclass(frozen=True, slots=True)
class ConfigureQueue:
    """No request's own operation: a ring that was kicked has become whole, whatever message did it."""

    index: int
    setup: QueueSetup


class Session:
    """The protocol of one connection.

    ``device_features`` are the 64 feature bits of device and rings; ``queue_size_max`` counts entries.
    ``offers_config``: CONFIG is offered to every front-end, also of a network interface.
    ``state`` is for reading: it changes only through ``accept``.
    """

    def __init__(
        self,
        *,
        device_features: int,
        queue_count: int,
        queue_size_max: int,
        has_config_space: bool = True,
        is_network_interface: bool = False,
        inband_notifications: bool = False,
        offers_config: bool = False,
    ) -> None:
        offered = offered_protocol_features(
            has_config_space=has_config_space,
            is_network_interface=is_network_interface,
            inband_notifications=inband_notifications,
        )
        to_owner = _CONFIG if is_network_interface and not offers_config else 0
        self.state: Final = ConnectionState(
            offered_features=device_features & ~NEVER_OFFERED | 1 << VHOST_USER_F_PROTOCOL_FEATURES,
            offered_protocol_features=offered & ~to_owner,
            offered_to_owner=offered & to_owner,
            queue_size_max=queue_size_max,
            rings=[Vring(index) for index in range(queue_count)],
            repeats_memory=is_network_interface,
        )
        self._framer = Framer(MESSAGES)
        self._pending: Request | None = None
        self._closed = False

    def receive(self, data: bytes, fds: Iterable[int | OwnedFd] = (), *, truncated: bool = False) -> None:
        """Take a chunk of any size with the descriptors that came with its first byte; never raises.

        Every descriptor is owned from here on. ``truncated``: the kernel had more descriptors than
        could be received (MSG_CTRUNC).
        """
        owned = [fd if isinstance(fd, OwnedFd) else OwnedFd(fd) for fd in fds]
        self._framer.receive(data, owned, truncated=truncated)

    @property
    def wanted_bytes(self) -> int:
        """How many bytes to read next, so that no chunk reaches into a second message."""
        return self._framer.wanted_bytes

    @property
    def is_between_messages(self) -> bool:
        """False once a message has begun and is not whole."""
        return self._framer.is_between_messages

    def next_request(self) -> Request | None:
        """The next request, valid by the table and by the state; None while bytes are missing."""
        if self._pending is not None:
            raise RuntimeError(f"{self._pending.name} was not answered yet")
        if self._closed:
            return None
        try:
            frame = self._framer.next_frame()
            self._pending = None if frame is None else self._plan(frame)
        except PeerError:
            self.close()
            raise
        return self._pending

    def accept(self, request: Request, value: Value = 0) -> bytes:
        """The operation is done with ``value``: change the state; the bytes to send, or none."""
        self._settle(request)
        request.operation.commit(self.state, value)
        if request.message.reply is Reply.ALWAYS:
            return payloads.build_reply(request.message.number, request.operation.answer(value))
        return _status(request, 0)

    def reject(self, request: Request, error: HyperbellError) -> bytes:
        """The operation failed and nothing changed: the bytes that tell the front-end.

        ``error`` itself is raised when the wire has no way to tell (the request has no reply, or one
        that cannot say failure): the connection must end.
        """
        self._settle(request)
        if request.message.answer is Payload.CONFIG:
            # "back-end uses zero length of payload to indicate an error" (VHOST_USER_GET_CONFIG)
            return payloads.build_reply(request.message.number, b"")
        told = _status(request, _FAILURE)
        missing = request.operation.missing_queue if isinstance(request.operation, Refuse) else None
        if missing is not None and request.message.answer is Payload.VRING_STATE:
            return payloads.build_reply(request.message.number, payloads.build_vring_state(missing, 0))
        if not told and missing is None:
            self.close()
            raise error
        return told

    # --- rings, whatever message made them whole ---

    def next_start(self) -> ConfigureQueue | None:
        """The next ring that was kicked and that the back-end can have now; ``started`` or ``hold`` answers it.

        ``PeerError``: there is no such ring; it is held.
        """
        state = self.state
        for ring in state.rings:
            if ring.wants_back_end and state.waits_for(ring) is None:
                try:
                    return ConfigureQueue(ring.index, ring.setup(packed=state.is_packed, space=state.ring_space))
                except PeerError:
                    self.hold(ring.index)
                    raise
        return None

    def started(self, index: int) -> None:
        """The back-end has the ring now."""
        self.state.rings[index].configured = True

    def hold(self, index: int) -> None:
        """The back-end could not have the ring: until the front-end says something else of it."""
        self.state.rings[index].refuse()

    def fail(self, request: Request) -> bytes:
        """Instead of what ``accept`` answered: a ring that the request made whole could not start. Empty: not asked."""
        return _status(request, _FAILURE)

    def close(self) -> None:
        """Close every descriptor still held; those of requests given out belong to whoever took them."""
        self._closed = True
        self._framer.close()

    def _plan(self, frame: Frame) -> Request:
        row = frame.message
        try:
            operation = plan(self.state, frame)
        except PeerError as error:
            if not _can_be_refused(frame):
                for fd in frame.fds:
                    fd.close()
                raise PeerError(str(error), request=row.name) from None
            operation = Refuse(str(error))
        request = Request(row, frame.need_reply, operation)
        kept = request.fds
        for fd in frame.fds:
            if not any(fd is one for one in kept):
                fd.close()  # refused, or a descriptor that REM_MEM_REG must not use
        return request

    def _settle(self, request: Request) -> None:
        if request is not self._pending:
            raise RuntimeError(f"{request.name} does not wait for an answer")
        self._pending = None


def _can_be_refused(frame: Frame) -> bool:
    row = frame.message
    rule = row.reply
    return (
        rule is Reply.ALWAYS_STATUS or (rule is Reply.ON_REQUEST and frame.need_reply) or row.answer is Payload.CONFIG
    )


def _status(request: Request, value: int) -> bytes:
    """The u64 that says success or failure, where the request may have one."""
    rule = request.message.reply
    if rule is Reply.ALWAYS_STATUS or (rule is Reply.ON_REQUEST and request.need_reply):
        return payloads.build_reply(request.message.number, payloads.build_u64(value))
    return b""
