"""A web server of the host's, for guests that reach out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kit.guest.blk import pattern

PAGE = pattern(3 * 1024 * 1024 + 5, 7)


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, format: str, *args: Any) -> None:  # the name is the base class's
        pass


@contextmanager
def web_server(folder: Path) -> Iterator[int]:
    """The port of 127.0.0.1 at which the files of ``folder`` are to be had."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
