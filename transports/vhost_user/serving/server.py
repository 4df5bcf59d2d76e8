"""The vhost-user transport's server: one device, one front-end at a time, for as long as the daemon lives."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVarTuple

import structlog
import trio

from transports.base import BackendLike
from transports.vhost_user.serving.connection import Connection
from transports.vhost_user.serving.endpoint import (
    Connect,
    Endpoint,
    Inherit,
    connect_unix,
    inherited_socket,
    is_listening,
)
from transports.vhost_user.serving.stats import ConnectionStats
from transports.vhost_user.serving.waiting import Waiting, has_hung_up
from virtio.clients import Door
from virtio.socket_file import Listen, SocketFile, check_path
from virtio.waist import QueueBroken

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

CONNECT_DELAY_MIN: Final = 0.1  # seconds between attempts of the client mode, doubled after each ...
CONNECT_DELAY_MAX: Final = 5.0  # ... up to this
SILENT_SECONDS: Final = 3.0  # a front-end that has not sent a message by then gives way to one that speaks
LOOK_SECONDS: Final = 0.25  # how often that is looked at, while somebody waits for a silent one's place

T = TypeVarTuple("T")


class VhostUserServer:
    """Serves ``backend`` at ``endpoint``. ``stats`` may be read at any time.

    ``inband_notifications``: offer that rings are kicked and called by messages. ``offers_config``: see ``Session``.
    """

    def __init__(
        self,
        backend: BackendLike,
        endpoint: Endpoint,
        *,
        stats: ConnectionStats | None = None,
        inband_notifications: bool = False,
        offers_config: bool = False,
    ) -> None:
        self._backend = backend
        self._endpoint = endpoint
        self._inband_notifications = inband_notifications
        self._offers_config = offers_config
        self.stats: Final = stats if stats is not None else ConnectionStats()
        self._log: FilteringBoundLogger = structlog.get_logger().bind(device=backend.name)
        self._connection: Connection | None = None
        self._socket: trio.socket.SocketType | None = None  # of the connection being served
        self._waiting = Waiting()
        self._messages_before = 0  # all that were received before the connection being served
        self._refused_in_a_row = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; an inherited connected socket is served until its front-end leaves.

        ``task_status.started()`` is called when front-ends can connect (client mode: when connecting
        begins). ``HostError`` if the endpoint cannot be had.
        """
        match self._endpoint:
            case Listen() as listen:
                socket_file = SocketFile(listen)
                try:
                    self._log.info("listening", socket=str(listen.path))
                    await self._beside_events(self._serve_listener, socket_file.socket, task_status)
                finally:
                    socket_file.close()
            case Connect(path=path):
                check_path(path)
                task_status.started()
                await self._beside_events(self._serve_by_connecting, path)
            case Inherit(fd=fd):
                with inherited_socket(fd) as sock:
                    if is_listening(sock):
                        await self._beside_events(self._serve_listener, sock, task_status)
                    else:
                        task_status.started()
                        await self._beside_events(self._serve_front_end, trio.socket.from_stdlib_socket(sock))

    async def _beside_events(self, serve: Callable[[*T], Awaitable[None]], *args: *T) -> None:
        """Serve front-ends while another task takes the back-end's events."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_backend)
            await serve(*args)
            nursery.cancel_scope.cancel()

    # --- front-ends ---

    async def _serve_listener(self, listener: socket.socket, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept, trio.socket.from_stdlib_socket(listener))
                task_status.started()
                while True:
                    await self._serve_front_end(await self._waiting.next())
        finally:
            for sock in self._waiting.take_all():
                sock.close()

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        """A front-end that restarts may connect before its old connection is over, and so it waits a little."""
        door = Door(listener, "a front-end", self._log)
        while True:
            sock = await door.accept()
            if (self._is_in_use and self._has_spoken) or not self._waiting.add(sock):
                self._refuse(sock)

    @property
    def _is_in_use(self) -> bool:
        return self._socket is not None and not has_hung_up(self._socket)

    @property
    def _has_spoken(self) -> bool:
        """The front-end that has the place has sent at least one whole message."""
        return self.stats.messages > self._messages_before

    async def _give_way(self, scope: trio.CancelScope) -> None:
        """End a connection that has said nothing for some seconds as soon as another front-end speaks."""
        patience = trio.current_time() + SILENT_SECONDS
        while not self._has_spoken:
            await self._waiting.arrival()
            if trio.current_time() >= patience and self._waiting.anybody_speaks() and not self._has_spoken:
                self._log.warning("front-end gave way: it has said nothing, and another speaks", seconds=SILENT_SECONDS)
                scope.cancel()
                return
            await trio.sleep(LOOK_SECONDS)
        if self._is_in_use:
            for sock in self._waiting.take_all():
                if has_hung_up(sock):
                    sock.close()
                else:
                    self._refuse(sock)

    def _refuse(self, sock: trio.socket.SocketType) -> None:
        sock.close()
        self.stats.refused += 1
        self._refused_in_a_row += 1
        if self._refused_in_a_row == 1:
            self._log.warning("a second front-end was refused: this device serves one at a time")

    async def _serve_by_connecting(self, path: Path) -> None:
        delay = CONNECT_DELAY_MIN
        last_error: int | None = None
        while True:
            try:
                sock = connect_unix(path)
            except OSError as error:
                if error.errno != last_error:
                    last_error = error.errno
                    self._log.info("waiting for a front-end", socket=str(path), error=error.strerror)
            else:
                last_error = None
                before = self.stats.messages
                await self._serve_front_end(trio.socket.from_stdlib_socket(sock))
                if self.stats.messages > before:
                    delay = CONNECT_DELAY_MIN
            await trio.sleep(delay)
            delay = min(delay * 2, CONNECT_DELAY_MAX)

    async def _serve_front_end(self, sock: trio.socket.SocketType) -> None:
        """One front-end from its first byte to the reset after its last."""
        self._refused_in_a_row = 0
        try:
            connection = Connection(
                self._backend,
                sock,
                self.stats,
                self._log,
                inband_notifications=self._inband_notifications,
                offers_config=self._offers_config,
            )
        except Exception as error:  # the device's mistake must not take the other guests' devices along
            sock.close()
            self._log.error("front-end refused: the device cannot say what it is", error=str(error))
            return
        self._socket, self._connection = sock, connection
        is_forgotten = False
        try:
            try:
                await self._run(connection)
            except Exception:
                # A fault of ours must not take the other guests' devices along.
                self._log.exception("connection ended: internal error")
            self._connection = None
            await self._forget_front_end(connection)
            is_forgotten = True
        finally:
            self._connection = None
            if not is_forgotten:  # the daemon is being stopped; `stop_seconds` ends one whose storage does not answer
                with trio.CancelScope(shield=True):
                    await self._forget_front_end(connection)
            self._socket = None

    async def _run(self, connection: Connection) -> None:
        self._messages_before = self.stats.messages
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_way, nursery.cancel_scope)
            await connection.run()
            nursery.cancel_scope.cancel()

    async def _forget_front_end(self, connection: Connection) -> None:
        """Leave nothing of a front-end behind: neither rings nor memory nor its eventfds."""
        await self._backend.reset()
        for ring in connection.session.state.rings:
            if ring.has_call:
                await self._backend.set_call(ring.index, None)
            if ring.has_err:
                await self._backend.set_err(ring.index, None)

    # --- the back-end ---

    async def _watch_backend(self) -> None:
        while True:
            event = await self._backend.next_event()
            if isinstance(event, QueueBroken):
                self._log.warning("queue broken", queue=event.index, error=str(event.error))
            elif self._connection is not None:
                self._connection.post(event)


async def serve(
    backend: BackendLike,
    endpoint: Endpoint,
    *,
    stats: ConnectionStats | None = None,
    inband_notifications: bool = False,
    offers_config: bool = False,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``backend`` to vhost-user front-ends at ``endpoint`` (see ``VhostUserServer.run``)."""
    server = VhostUserServer(
        backend, endpoint, stats=stats, inband_notifications=inband_notifications, offers_config=offers_config
    )
    await server.run(task_status=task_status)
