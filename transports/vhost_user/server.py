"""The vhost-user transport's server: one device, one front-end at a time, for as long as the daemon lives."""

from __future__ import annotations

import select
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVarTuple

import structlog
import trio

from transports.base import BackendLike
from transports.vhost_user.connection import Connection
from transports.vhost_user.endpoint import (
    Connect,
    Endpoint,
    Inherit,
    Listen,
    SocketFile,
    check_path,
    connect_unix,
    inherited_socket,
    is_listening,
)
from transports.vhost_user.stats import ConnectionStats
from virtio.clients import Door
from virtio.waist import QueueBroken

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

CONNECT_DELAY_MIN: Final = 0.1  # seconds between attempts of the client mode, doubled after each ...
CONNECT_DELAY_MAX: Final = 5.0  # ... up to this
RESET_LIMIT: Final = 1.0  # seconds a reset may take when the daemon is being stopped

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
        # One place to wait in: a front-end that restarts may connect before its old connection is over.
        send, receive = trio.open_memory_channel[trio.socket.SocketType](1)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept, trio.socket.from_stdlib_socket(listener), send)
                task_status.started()
                async for sock in receive:
                    await self._serve_front_end(sock)
        finally:
            while True:
                try:
                    receive.receive_nowait().close()
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            send.close()
            receive.close()

    async def _accept(
        self, listener: trio.socket.SocketType, send: trio.MemorySendChannel[trio.socket.SocketType]
    ) -> None:
        door = Door(listener, "a front-end", self._log)
        while True:
            sock = await door.accept()
            try:
                if self._socket is not None and not _has_hung_up(self._socket):
                    raise trio.WouldBlock
                send.send_nowait(sock)
            except trio.WouldBlock:
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
                await connection.run()
            except Exception:
                # A fault of ours must not take the other guests' devices along.
                self._log.exception("connection ended: internal error")
            self._connection = None
            await self._forget_front_end(connection)
            is_forgotten = True
        finally:
            self._connection = None
            if not is_forgotten:  # the daemon is being stopped
                with trio.move_on_after(RESET_LIMIT, shield=True):
                    await self._forget_front_end(connection)
            self._socket = None

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


def _has_hung_up(sock: trio.socket.SocketType) -> bool:
    """Whether the other side has closed, though there may still be something to read (or it was closed here)."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


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
