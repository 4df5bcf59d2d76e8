"""One front-end's connection: the thin trio loop around a ``Session``."""

from __future__ import annotations

import array
import socket
from typing import TYPE_CHECKING, Final

import trio

from transports.base import BackendLike
from transports.vhost_user.requests.device import ResetDevice, SetBackendChannel, StopDevice
from transports.vhost_user.requests.operation import Refuse, Request, Value
from transports.vhost_user.requests.rings import KickQueue, SetCall, SetErr, SetKick, StopQueue
from transports.vhost_user.serving.backend_channel import BackendChannel, BackendEvent, RingCall, RingError
from transports.vhost_user.serving.inband import InbandNotifications
from transports.vhost_user.serving.stats import ConnectionStats
from transports.vhost_user.session import ConfigureQueue, Session
from transports.vhost_user.wire.message import UNKNOWN_REQUEST
from transports.vhost_user.wire.numbers import (
    VHOST_USER_PROTOCOL_F_CONFIG,
    VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
)
from virtio.clients import Shortage, receive_with_descriptors, received_descriptors
from virtio.errors import GuestError, HostError, HyperbellError, PeerError
from virtio.spec import VIRTIO_ID_NET
from virtio.waist import ConfigChanged, IotlbMiss

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

WRITE_TIMEOUT: Final = 10.0  # seconds a front-end may take to read a reply of some bytes
ACK_TIMEOUT: Final = 5.0  # seconds a front-end may take to acknowledge a back-end request
MISSES_MAX: Final = 1024  # translations asked for at the same time; a queue waits for one at a time

# Room for more descriptors than a message may have: too many is then seen as such, not as a truncation.
_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(16 * array.array("i").itemsize)


class Connection:
    """Serves one connected socket until the front-end leaves or breaks the protocol.

    The back-end is not reset at the end: that is the server's, before it takes the next front-end.
    """

    def __init__(
        self,
        backend: BackendLike,
        sock: trio.socket.SocketType,
        stats: ConnectionStats,
        log: FilteringBoundLogger,
        *,
        inband_notifications: bool = False,
        offers_config: bool = False,
    ) -> None:
        self._backend = backend
        self._socket = sock
        self._stats = stats
        self._log = log
        self._shortage = Shortage("a message of a front-end", log)
        self.session = Session(
            device_features=backend.device_features(),
            queue_count=backend.queue_count,
            queue_size_max=backend.queue_size_max,
            has_config_space=backend.has_config_space,
            is_network_interface=backend.device_id == VIRTIO_ID_NET,
            inband_notifications=inband_notifications,
            offers_config=offers_config,
        )
        self._current: str = ""  # the request being carried out
        self._refused: set[str] = set()  # what was refused and logged already: requests, by name
        self._channel: BackendChannel | None = None
        self._config_changed = False
        self._misses: dict[IotlbMiss, None] = {}  # an ordered set
        self._calls: dict[RingCall | RingError, None] = {}  # likewise, at most two for each ring
        self._inband: InbandNotifications | None = None
        self._undone: set[type[BackendEvent]] = set()  # what the front-end could not do was logged already
        self._wake = trio.Event()
        self._warned_of_missing_channel = False

    async def run(self) -> None:
        """Serve until the end, and log it in one line. Closes the socket."""
        self._stats.begin()
        self._log.info("front-end connected")
        try:
            async with trio.open_nursery() as nursery:
                self._inband = InbandNotifications(self._backend, nursery, self.post)
                nursery.start_soon(self._forward_events)
                await self._converse()
                nursery.cancel_scope.cancel()
        finally:
            self._inband = None  # it refers to this connection: the circle would keep the device until it is collected
            self._stats.end()
            self.session.close()
            self._socket.close()
            if self._channel is not None:
                self._channel.close()

    def post(self, event: BackendEvent) -> None:
        """Tell the front-end of ``event`` as soon as it may be told; never waits.

        While all rings are stopped the device is suspended and sends nothing: what happens then is told
        when a ring starts. A ring may miss a translation before its start was even acknowledged.
        """
        if isinstance(event, ConfigChanged):
            self._config_changed = True
        elif isinstance(event, RingCall | RingError):
            self._calls[event] = None
        elif len(self._misses) < MISSES_MAX:
            self._misses[event] = None
        self._wake.set()

    # --- requests of the front-end ---

    async def _converse(self) -> None:
        try:
            await self._serve_requests()
        except PeerError as error:
            request = error.request or self._current or UNKNOWN_REQUEST
            self._stats.protocol_errors[request] += 1
            self._log.warning("connection ended: the front-end broke the protocol", request=request, error=str(error))
        except HyperbellError as error:
            self._log.error("connection ended: a request failed", request=self._current, error=str(error))
        except OSError as error:
            self._log.info("connection ended: the front-end left", error=str(error))
        else:
            if self.session.is_between_messages:
                self._log.info("connection ended: the front-end left")
            else:
                self._log.warning("connection ended: the front-end left in the middle of a message")

    async def _serve_requests(self) -> None:
        while True:
            request = self.session.next_request()
            if request is None:
                if not await self._receive():
                    return
                continue
            self._current = request.name
            self._stats.messages += 1
            reply = await self._serve(request)
            self._stats.memory_regions = len(self.session.state.memory.regions)
            self._stats.hears_changes = self._hears_changes
            if reply:
                await self._send(reply)
            self._current = ""

    async def _serve(self, request: Request) -> bytes:
        try:
            value = await self._carry_out(request)
        except HyperbellError as error:
            if isinstance(error, PeerError) and error.final:
                self.session.close()
                raise
            reply = self.session.reject(request, error)  # raises when the front-end cannot be told
            what = "a missing queue" if _is_about_a_missing_queue(request) else request.name
            if what not in self._refused:
                self._refused.add(what)
                self._log.warning("request refused", request=request.name, error=str(error))
            if isinstance(error, PeerError):
                self._stats.protocol_errors[request.name] += 1
            return reply
        reply = self.session.accept(request, value)
        failure = await self._start_rings()
        if isinstance(failure, PeerError | HostError):
            reply = self.session.fail(request) or reply
            if isinstance(failure, HostError) and not reply:
                raise failure
        if failure is None and isinstance(request.operation, SetKick):
            self._tell_of_waiting(request.operation.index)
        if isinstance(request.operation, StopQueue | StopDevice | ResetDevice) and self.session.state.is_suspended:
            self._misses.clear()
            self._calls.clear()
        self._wake.set()  # a ring may run now, or a channel be there
        return reply

    async def _start_rings(self) -> HyperbellError | None:
        """Give the back-end the rings that are whole now; what was wrong with the first that could not start.

        A mistake of the driver's leaves its ring stopped and is no fault of the front-end's.
        """
        failure: HyperbellError | None = None
        while True:
            start: ConfigureQueue | None = None
            try:
                start = self.session.next_start()
                if start is None:
                    return failure
                await self._backend.configure_queue(start.index, start.setup)
            except HyperbellError as error:
                failure = failure or error
                if start is not None:
                    self.session.hold(start.index)
                whose = ": the driver set it up wrongly" if isinstance(error, GuestError) else ""
                self._log.warning(f"queue not started{whose}", queue=start.index if start else None, error=str(error))
            else:
                self.session.started(start.index)

    def _tell_of_waiting(self, index: int) -> None:
        state = self.session.state
        ring = state.rings[index]
        if not ring.configured and (missing := state.waits_for(ring)) is not None:
            self._log.info("queue waits", queue=index, needs=missing)

    async def _carry_out(self, request: Request) -> Value:
        operation = request.operation
        if isinstance(operation, KickQueue):
            assert self._inband is not None
            self._inband.kick(operation.index)
            return 0
        if not isinstance(operation, SetBackendChannel):
            if self._is_inband and isinstance(operation, SetKick | SetCall | SetErr):
                assert self._inband is not None
                operation = await self._inband.prepare(operation, self.session.state.rings[operation.index])
            return await operation.perform(self._backend)
        channel = BackendChannel(
            operation.fd,
            wants_replies=self.session.state.has_protocol_feature(VHOST_USER_PROTOCOL_F_REPLY_ACK),
        )
        if self._channel is not None:
            self._channel.close()
        self._channel = channel
        return 0

    @property
    def _is_inband(self) -> bool:
        return self.session.state.has_protocol_feature(VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)

    async def _receive(self) -> bool:
        """Read some bytes into the session; False at the end of the stream."""
        data, ancillary, flags = await receive_with_descriptors(
            self._socket, self.session.wanted_bytes, _ANCILLARY_SIZE, self._shortage
        )
        fds = received_descriptors(ancillary)
        self.session.receive(data, fds, truncated=bool(flags & socket.MSG_CTRUNC))
        return bool(data)

    async def _send(self, reply: bytes) -> None:
        rest = memoryview(reply)
        try:
            with trio.fail_after(WRITE_TIMEOUT):
                while rest:
                    rest = rest[await self._socket.send(rest) :]
        except trio.TooSlowError:
            raise PeerError(f"the front-end has not read its replies for {WRITE_TIMEOUT:g} seconds") from None

    # --- requests of our own ---

    async def _forward_events(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while (event := self._next_event()) is not None:
                await self._tell(event)

    def _next_event(self) -> BackendEvent | None:
        state = self.session.state
        if state.is_suspended:
            return None
        if self._channel is None:
            if self._misses and not self._warned_of_missing_channel:
                self._warned_of_missing_channel = True
                self._log.warning("a queue waits for a translation, but the front-end gave no back-end channel")
            return None
        if self._misses:
            miss = next(iter(self._misses))
            del self._misses[miss]
            return miss
        if self._calls:
            call = next(iter(self._calls))
            del self._calls[call]
            return call
        if self._config_changed:
            self._config_changed = False
            return ConfigChanged() if self._hears_changes else None
        return None

    @property
    def _hears_changes(self) -> bool:
        has_config = self.session.state.has_protocol_feature(VHOST_USER_PROTOCOL_F_CONFIG)
        return has_config and self._channel is not None

    async def _tell(self, event: BackendEvent) -> None:
        channel = self._channel
        assert channel is not None
        try:
            with trio.fail_after(WRITE_TIMEOUT):
                await channel.send(event)
            with trio.move_on_after(ACK_TIMEOUT) as waiting:
                if await channel.result() != 0 and type(event) not in self._undone:
                    self._undone.add(type(event))
                    self._log.warning("the front-end could not do what the back-end asked", asked=repr(event))
            if waiting.cancelled_caught:
                channel.requests.stop_asking()
                self._log.warning(
                    "the front-end does not answer on the back-end channel; from now on it is not asked to",
                    waited_seconds=ACK_TIMEOUT,
                )
        except trio.TooSlowError:
            self._log.warning("the front-end does not read the back-end channel; it is not used any more")
            self._drop_channel(channel)
        except trio.ClosedResourceError:
            self.post(event)  # replaced while we waited: once more, over the new channel
        except PeerError as error:
            self._stats.protocol_errors[error.request] += 1
            self._log.warning("the back-end channel is not used any more", request=error.request, error=str(error))
            self._drop_channel(channel)
        except OSError as error:
            self._log.warning("the back-end channel is not used any more", error=str(error))
            self._drop_channel(channel)

    def _drop_channel(self, channel: BackendChannel) -> None:
        if self._channel is channel:
            self._channel = None
        channel.close()


def _is_about_a_missing_queue(request: Request) -> bool:
    return isinstance(request.operation, Refuse) and request.operation.missing_queue is not None
