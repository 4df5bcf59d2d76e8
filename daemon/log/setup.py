"""Logging: structlog to stderr, for people, for the journal, or as JSON lines.

Levels and format can change while the daemon runs. Everything that knows its device, queue or connection binds it
(``structlog.get_logger().bind(device=...)``); nothing logs per request. While ``in_background`` is entered, no line
waits for its reader, and no kind of line floods the log.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Final, TextIO

import structlog
from structlog.typing import Processor

from daemon.log.floods import SPAN_SECONDS, Floods
from daemon.log.queue import LineQueue, write_line

LEVELS: Final[Mapping[str, int]] = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
FORMATS: Final = ("auto", "human", "json", "journal")

_PRIORITIES: Final[Mapping[str, int]] = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog priorities, as sd-daemon(3) has them in its line prefixes."""


class _Threshold:
    """The least level that is logged; a processor, so that a reload reaches loggers that are already bound."""

    def __init__(self) -> None:
        self.least = LEVELS["info"]

    def __call__(self, _logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if LEVELS.get(method, LEVELS["critical"]) < self.least:
            raise structlog.DropEvent
        return event


class _Lines:
    """Writes finished lines to ``stream``. One that cannot be written is dropped: a log must not stop the daemon."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.queue: LineQueue | None = None
        self.given_up = False

    def msg(self, line: str) -> None:
        if self.queue is not None:
            self.queue.put(line)
        elif not self.given_up:
            write_line(self.stream, line)

    debug = info = warning = error = critical = msg


class _FloodGate:
    """A processor, so that what is bound already passes it too; open at level debug, and while no queue is there."""

    def __init__(self) -> None:
        self.floods: Floods | None = None

    def __call__(self, logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if self.floods is None or _threshold.least <= LEVELS["debug"]:
            return event
        return self.floods(logger, method, event)


# One of each for the whole process, changed in place: loggers that were bound before a change follow it.
_threshold = _Threshold()
_gate = _FloodGate()
_lines = _Lines(sys.stderr)
_pipeline: list[Processor] = []


def configure(level: str, format_name: str, stream: TextIO | None = None) -> None:
    """Log what is at least ``level`` (a key of ``LEVELS``) to ``stream`` (stderr) in one of ``FORMATS``.

    ``auto`` is ``human`` on a terminal, ``journal`` when stderr goes to the systemd journal, else ``json``.
    Loggers made before follow.
    """
    stream = sys.stderr if stream is None else stream
    if format_name == "auto":
        format_name = choose_format(stream, os.environ)
    _threshold.least = LEVELS[level]
    _lines.stream, _lines.given_up = stream, False
    _pipeline[:] = [
        _threshold,
        structlog.contextvars.merge_contextvars,
        _gate,
        _level_name,
        *_renderers(format_name, stream),
    ]
    structlog.configure(
        processors=_pipeline,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS["debug"]),
        logger_factory=lambda *_: _lines,
        cache_logger_on_first_use=False,
    )


@contextmanager
def in_background() -> Iterator[None]:
    """Write lines in a thread, and limit floods. At the end the last lines are written, as far as their reader lets us
    in a limited time; a reader that does not gets nothing more.
    """
    floods = Floods()
    queue = LineQueue(lambda: _lines.stream, _tell_of_lost, lambda: _tell_of_floods(floods))
    _lines.queue, _gate.floods = queue, floods
    try:
        with _others_too():
            yield
    finally:
        _tell_of_floods(floods, all_of_them=True)
        _gate.floods = None
        written = queue.close()
        _lines.queue, _lines.given_up = None, not written


def last_words() -> None:
    """Before the process ends without a word: write the lines that wait, as far as their reader lets us."""
    if _lines.queue is not None:
        _lines.given_up = not _lines.queue.close()
        _lines.queue = None


class _Forwarder(logging.Handler):
    """What a device's file, or a library, says by Python's own logging or as a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        # Formatting can fail by a mistake of its caller's, who must not be stopped by it.
        try:
            text = record.getMessage()
        except Exception:
            text = str(record.msg)
        level = record.levelname.lower()
        method = level if level in LEVELS else "warning"
        structlog.get_logger().log(LEVELS[method], text, logger=record.name, exc_info=record.exc_info)


@contextmanager
def _others_too() -> Iterator[None]:
    """What Python itself would write to stderr, waiting for its reader, becomes lines of the log."""
    handler, root = _Forwarder(), logging.getLogger()
    hooks = sys.unraisablehook, threading.excepthook

    def unraisable(failure: sys.UnraisableHookArgs) -> None:
        what = failure.err_msg or "exception ignored"
        structlog.get_logger().error(what, object=repr(failure.object), exc_info=failure.exc_value)

    def thread_failed(failure: threading.ExceptHookArgs) -> None:
        name = failure.thread.name if failure.thread is not None else "unknown"
        structlog.get_logger().error("a thread failed", thread=name, exc_info=failure.exc_value)

    sys.unraisablehook, threading.excepthook = unraisable, thread_failed
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        sys.unraisablehook, threading.excepthook = hooks


def lines_lost() -> Mapping[str, int]:
    """Lines that were not written since the daemon began, by reason."""
    if _lines.queue is None or _gate.floods is None:
        return {}
    return dict(_lines.queue.dropped) | {"too many of a kind": _gate.floods.left_out}


def _tell_of_lost(lines: int) -> None:
    structlog.get_logger().warning("lines of the log were lost: they were not read in time", lines=lines)


def _tell_of_floods(floods: Floods, *, all_of_them: bool = False) -> None:
    for (event, device), count in floods.take_ended(all_of_them=all_of_them).items():
        logger = structlog.get_logger().bind(**({"device": device} if device else {}))
        logger.warning("too many lines of a kind", line=event, left_out=count, seconds=SPAN_SECONDS)


def choose_format(stream: TextIO, environment: Mapping[str, str]) -> str:
    """The format ``auto`` stands for, from what ``stream`` is and from JOURNAL_STREAM (systemd.exec(5))."""
    if stream.isatty():
        return "human"
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return "json"
    to_journal = environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return "journal" if to_journal else "json"


def _level_name(_logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["level"] = "error" if method == "exception" else method
    return event


def _renderers(format_name: str, stream: TextIO) -> list[Processor]:
    if format_name == "human":
        colors = stream.isatty() and not os.environ.get("NO_COLOR")
        return [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=colors, pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    if format_name == "journal":  # the journal has its own clock
        return [structlog.processors.format_exc_info, render_journal]
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _well_known_first,
        structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
    ]


def _well_known_first(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event} | dict(event)


def render_journal(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    """One line ``<N>event key=value ...`` with the syslog priority N; values that need it are quoted as in JSON.

    Line breaks, also those of a traceback, stay inside the quotes, so one event is one record of the journal.
    """
    priority = _PRIORITIES[event.pop("level")]
    message = json.dumps(str(event.pop("event", "")), ensure_ascii=False)[1:-1].replace('\\"', '"')
    return " ".join([f"<{priority}>{message}", *(f"{key}={_plain(value)}" for key, value in event.items())])


def _plain(value: object) -> str:
    text = str(value)
    quoted = json.dumps(text, ensure_ascii=False)
    return text if text and quoted == f'"{text}"' and not any(mark in text for mark in " =") else quoted
