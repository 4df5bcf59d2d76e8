"""The page /metrics over HTTP/1.1, one request a connection.

Any user of the host may connect, so nothing here grows with what they do: so many connections at most, one deadline for
a request as a whole, and one page made at a time. A scrape takes one snapshot in the event loop; a thread formats it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
import trio
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app

from daemon.metrics.page import StateCollector
from daemon.state import DaemonState
from virtio.clients import Door, Place, Places
from virtio.errors import HostError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PATH: Final = "/metrics"
CONNECTIONS_MAX: Final = 16
REQUEST_SECONDS: Final = 10.0  # from the connection to the last byte of the answer
REQUEST_MAX: Final = 16 * 1024  # bytes
BACKLOG: Final = 16

_ANSWERING: Final = 1  # gives way later than one that has not said yet what it wants


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    query: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class _Answer:
    status: str
    headers: list[tuple[str, str]]
    body: bytes

    @classmethod
    def plain(cls, status: str, text: str) -> _Answer:
        return cls(status, [("Content-Type", "text/plain; charset=utf-8")], text.encode() + b"\n")

    def bytes(self, *, with_body: bool) -> bytes:
        headers = [*self.headers, ("Content-Length", str(len(self.body))), ("Connection", "close")]
        lines = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode("latin-1", "replace") + (self.body if with_body else b"")


class _Page:
    """Makes the page: the event loop gives a snapshot, one thread at a time formats it."""

    def __init__(self, snapshot: Callable[[], DaemonState]) -> None:
        self._snapshot = snapshot
        self._current = DaemonState((), ())
        self._one_at_a_time = trio.CapacityLimiter(1)
        registry = CollectorRegistry()
        registry.register(StateCollector(lambda: self._current))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._application = make_wsgi_app(registry)

    async def make(self, request: _Request) -> _Answer:
        try:
            async with self._one_at_a_time:
                self._current = self._snapshot()
                return await trio.to_thread.run_sync(self._format, request)
        except Exception:
            structlog.get_logger().exception("the metrics cannot be collected")
            return _Answer.plain(
                "500 Internal Server Error", "the metrics cannot be collected; the daemon's log says why"
            )

    def _format(self, request: _Request) -> _Answer:
        """Which of its formats the client prefers, and which metrics, is the library's to say."""
        answer = _Answer("", [], b"")

        def start_response(status: str, headers: list[tuple[str, str]], _error: object = None) -> Callable[..., object]:
            answer.status, answer.headers = status, headers
            return lambda data: None

        environment: WSGIEnvironment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in request.headers.items()},
        }
        start: StartResponse = start_response
        pieces: Iterable[bytes] = self._application(environment, start)
        answer.body = b"".join(pieces)
        return answer


async def serve_metrics(
    host: str,
    port: int,
    snapshot: Callable[[], DaemonState],
    *,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``snapshot`` at http://host:port/metrics until cancelled; port 0 takes a free one.

    Started with the address really bound. Raises ``HostError`` when it cannot be had.
    """
    with _bind(host, port) as bound:
        listener = trio.socket.from_stdlib_socket(bound)
        address = bound.getsockname()
        door, places, page = Door(listener, "a client of the metrics"), Places(CONNECTIONS_MAX), _Page(snapshot)
        async with trio.open_nursery() as nursery:
            task_status.started((str(address[0]), int(address[1])))
            while True:
                client, place = await places.accept(door)
                nursery.start_soon(_serve, trio.SocketStream(client), page, places, place)


async def _serve(stream: trio.SocketStream, page: _Page, places: Places, place: Place) -> None:
    try:
        async with stream:
            with place.scope, trio.move_on_after(REQUEST_SECONDS):
                try:
                    request = await _read(stream)
                    if isinstance(request, _Request):
                        place.rank = None
                        answer, with_body = await _answer(request, page), request.method != "HEAD"
                        place.rank = _ANSWERING
                    elif request is None:
                        return
                    else:
                        answer, with_body = request, True
                    await stream.send_all(answer.bytes(with_body=with_body))
                    await stream.send_eof()
                    # Closed with something unread, the connection would be reset, and the answer lost on its way.
                    while await stream.receive_some(REQUEST_MAX):
                        pass
                except trio.BrokenResourceError:
                    return  # the client left
    finally:
        places.leave(place)


async def _read(stream: trio.SocketStream) -> _Request | _Answer | None:
    """What is asked for, or what is wrong with it; ``None``: the client left."""
    data = b""
    while b"\r\n\r\n" not in data and b"\n\n" not in data:
        if len(data) > REQUEST_MAX:
            return _Answer.plain("431 Request Header Fields Too Large", "the request is too long")
        received = await stream.receive_some(REQUEST_MAX)
        if not received:
            return None
        data += received
    first, *rest = data.decode("latin-1").replace("\r\n", "\n").partition("\n\n")[0].split("\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return _Answer.plain("400 Bad Request", "this is not a request of HTTP/1")
    fields = (line.partition(":") for line in rest)
    headers = {name.strip().lower(): value.strip() for name, colon, value in fields if colon}
    path, _, query = words[1].partition("?")
    return _Request(words[0], path, query, headers)


async def _answer(request: _Request, page: _Page) -> _Answer:
    if request.method not in ("GET", "HEAD"):
        refused = _Answer.plain("405 Method Not Allowed", "the metrics can be read and nothing else")
        refused.headers.append(("Allow", "GET, HEAD"))
        return refused
    if request.path != PATH:
        return _Answer.plain("404 Not Found", f"the metrics are at {PATH}")
    return await page.make(request)


def metrics_url(host: str, port: int) -> str:
    """Where a browser finds the page."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{PATH}"


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # The address of a daemon that has just ended is free (SO_REUSEADDR, which create_server sets).
        return socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise HostError(
            f"[daemon] metrics: cannot listen on {host} port {port}: {_reason(error)}; "
            'name another address, or write metrics = "off"',
            errno=error.errno or 0,
        ) from error


def _reason(error: OSError) -> str:
    """Without what ``create_server`` adds. A name that cannot be looked up has a number of its own."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error.strerror or error)
    return os.strerror(error.errno)
