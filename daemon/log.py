"""Logging: structlog to stderr, for people, for the journal, or as JSON lines.

Levels and format can change while the daemon runs. Everything that knows its device, queue or connection binds it
(``structlog.get_logger().bind(device=...)``); nothing logs per request.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, TextIO

import structlog
from structlog.typing import Processor

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

    def msg(self, line: str) -> None:
        try:
            self.stream.write(line + "\n")
            self.stream.flush()
        except (OSError, ValueError):  # the reader of a pipe is gone, or the stream was closed
            return

    debug = info = warning = error = critical = msg


# One of each for the whole process, changed in place: loggers that were bound before a change follow it.
_threshold = _Threshold()
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
    _lines.stream = stream
    _pipeline[:] = [
        _threshold,
        structlog.contextvars.merge_contextvars,
        _level_name,
        *_renderers(format_name, stream),
    ]
    structlog.configure(
        processors=_pipeline,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS["debug"]),
        logger_factory=lambda *_: _lines,
        cache_logger_on_first_use=False,
    )


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
