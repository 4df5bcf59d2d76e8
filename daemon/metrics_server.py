"""The page /metrics over HTTP, from threads of its own.

A scrape asks the event loop for one snapshot and formats it in its own thread; no lock of the data path is taken.
The accepting thread sleeps in the kernel until somebody connects.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
import trio
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app

from daemon.metrics import StateCollector
from daemon.state import DaemonState
from virtio.errors import HostError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PATH = "/metrics"


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds a client may take to send its request

    def log_message(self, format: str, *args: Any) -> None:
        """No line per scrape."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int]) -> None:
        self.address_family = family
        super().__init__(address, _Handler)
        self.ending = False

    def server_bind(self) -> None:
        """Bind without the look-up of the host's own name that http.server does, which may ask a name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        structlog.get_logger().debug("a scrape of the metrics ended early", exc_info=True)

    def accept_until_closed(self) -> None:
        while not self.ending:
            self.handle_request()

    def end_accepting(self) -> None:
        """Wake ``accept_until_closed`` for the last time: shutting a listening socket down makes it readable."""
        self.ending = True
        self.socket.shutdown(socket.SHUT_RDWR)


@asynccontextmanager
async def serve_metrics(host: str, port: int, snapshot: Callable[[], DaemonState]) -> AsyncIterator[tuple[str, int]]:
    """Serve ``snapshot`` (called in the event loop) at http://host:port/metrics; port 0 takes a free one.

    Gives the address really bound. Raises ``HostError`` when it cannot be had.
    """
    token = trio.lowlevel.current_trio_token()
    registry = CollectorRegistry()
    registry.register(StateCollector(partial(trio.from_thread.run_sync, snapshot, trio_token=token)))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    server = _bind(host, port)
    server.set_app(_only_metrics(make_wsgi_app(registry)))
    thread = threading.Thread(target=server.accept_until_closed, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_name, server.server_port
    finally:
        server.end_accepting()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(thread.join)
        server.server_close()


def metrics_url(host: str, port: int) -> str:
    """Where a browser finds the page."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{PATH}"


def _bind(host: str, port: int) -> _Server:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return _Server(family, (str(address[0]), port))
    except OSError as error:
        raise HostError(
            f"[daemon] metrics: cannot listen on {host} port {port}: {error.strerror}; "
            'name another address, or write metrics = "off"',
            errno=error.errno or 0,
        ) from error


def _only_metrics(application: WSGIApplication) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        plain = [("Content-Type", "text/plain; charset=utf-8")]
        if environ.get("PATH_INFO") != PATH:
            start_response("404 Not Found", plain)
            return [f"the metrics are at {PATH}\n".encode()]
        try:
            return application(environ, start_response)
        except Exception:
            structlog.get_logger().exception("the metrics cannot be collected")
            start_response("500 Internal Server Error", plain)
            return [b"the metrics cannot be collected; the daemon's log says why\n"]

    return answer
