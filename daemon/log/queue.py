"""Finished lines of the log on their way to a reader that may be slow, gone, or never there.

The event loop only appends to a bounded queue. One thread writes, and may be stuck in ``write`` for as long as the
reader of a pipe likes. Lines for which the queue has no room are counted, and lost.
"""

from __future__ import annotations

import os
import select
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, TextIO

QUEUE_LINES: Final = 4096
QUEUE_BYTES: Final = 1024 * 1024
"""What waits to be written is at most so much; the newest lines are the ones that are lost."""

FLUSH_SECONDS: Final = 2.0
"""How long the last lines may take at the end of the daemon."""

SWEEP_SECONDS: Final = 5.0
"""How often the writer looks for counts to report while nothing is to be written."""

SLOW: Final = "reader too slow"
FAILED: Final = "cannot be written"


def write_line(stream: TextIO, line: str) -> bool:
    """Write ``line`` past the stream's buffer, whose lock a stuck thread would hold at the interpreter's end.

    Waits for as long as the reader does. False when the line cannot be written.
    """
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a stream in memory, or one that was closed
        return _write_text(stream, line)
    rest = memoryview(line.encode(errors="backslashreplace") + b"\n")
    try:
        while rest:
            try:
                rest = rest[os.write(number, rest) :]
            except BlockingIOError:  # somebody who shares the file made it non-blocking
                poll = select.poll()
                poll.register(number, select.POLLOUT)
                poll.poll()
    except OSError:  # the reader of a pipe is gone
        return False
    return True


def _write_text(stream: TextIO, line: str) -> bool:
    try:
        stream.write(line + "\n")
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


class LineQueue:
    """``put`` never waits. ``stream`` gives where to write now; ``lost`` is called in the writer's thread with the
    number of lines that the queue had no room for, once it has drained; ``sweep`` now and then.
    """

    def __init__(self, stream: Callable[[], TextIO], lost: Callable[[int], None], sweep: Callable[[], None]) -> None:
        self._stream = stream
        self._tell_of_lost = lost
        self._sweep = sweep
        self._lines: deque[str] = deque()
        self._size = 0
        self._untold = 0
        self._ending = False
        self._changed = threading.Condition()
        self.dropped: Final[Counter[str]] = Counter({SLOW: 0, FAILED: 0})
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        with self._changed:
            if len(self._lines) >= QUEUE_LINES or self._size + len(line) > QUEUE_BYTES:
                self.dropped[SLOW] += 1
                self._untold += 1
                return
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify()

    def close(self, limit: float = FLUSH_SECONDS) -> bool:
        """Write what waits, for ``limit`` seconds at most; False when some of it could not be written by then."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(limit)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (line := self._next()) is not None:
            if not write_line(self._stream(), line):
                with self._changed:
                    self.dropped[FAILED] += 1

    def _next(self) -> str | None:
        """The next line to write; ``None`` when all is written and the daemon ends."""
        while True:
            with self._changed:
                if self._lines:
                    line = self._lines.popleft()
                    self._size -= len(line)
                    return line
                lost, self._untold = self._untold, 0
                if not lost:
                    if self._ending:
                        return None
                    self._changed.wait(SWEEP_SECONDS)
                    if self._lines:
                        continue
            # Without the lock: both log, which puts a line.
            if lost:
                self._tell_of_lost(lost)
            self._sweep()
