"""No kind of line may flood the log: of each, so many go out in a span of time, and the rest is counted.

A kind is what happened (the event's words) and to which device. What the event says beyond that (numbers, addresses,
texts of errors) does not make another kind: a peer may choose it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

SPAN_SECONDS: Final = 10.0
OF_A_DEVICE: Final = 20
"""Lines of a kind in a span. A device's peers can cause its lines as often as they like ..."""

OF_THE_DAEMON: Final = 200
"""... and a kind without a device is caused by an operator or by somebody at one of the daemon's own sockets."""

KINDS_MAX: Final = 4096
"""A mistake of ours or of a device's, a text that changes each time as the event, must not fill the memory."""

LIMITED_AT_ITS_SOURCE: Final = frozenset({"guest console"})
"""What a guest prints is limited by the line where it comes from, with a share of its own for each device."""

Kind = tuple[str, str]


@dataclass(slots=True)
class _Span:
    since: float
    lines: int = 0
    left_out: int = 0


class Floods:
    """A processor: raises ``structlog.DropEvent`` for a line too many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._spans: dict[Kind, _Span] = {}
        self.left_out = 0
        """Lines left out since the daemon began."""

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        text = str(event.get("event", ""))
        if text in LIMITED_AT_ITS_SOURCE:
            self.left_out += int(event.get("left_out", 0))
            return event
        if "left_out" in event:
            return event
        device = str(event.get("device", ""))
        most = OF_A_DEVICE if device else OF_THE_DAEMON
        with self._lock:
            if not self._admit((text, device), most):
                self.left_out += 1
                raise structlog.DropEvent
        return event

    def _admit(self, kind: Kind, most: int) -> bool:
        now = self._clock()
        span = self._spans.get(kind)
        # A span with a count to report ends when the count was reported (``take_ended``).
        if span is None or (now - span.since >= SPAN_SECONDS and not span.left_out):
            if span is None and len(self._spans) >= KINDS_MAX:
                return False
            span = self._spans[kind] = _Span(now)
        if span.lines >= most:
            span.left_out += 1
            return False
        span.lines += 1
        return True

    def take_ended(self, *, all_of_them: bool = False) -> Mapping[Kind, int]:
        """How many lines of each kind were left out, of the spans that are over (or of all). Forgets these spans."""
        now = self._clock()
        with self._lock:
            ended = {
                kind: span for kind, span in self._spans.items() if all_of_them or now - span.since >= SPAN_SECONDS
            }
            for kind in ended:
                del self._spans[kind]
        return {kind: span.left_out for kind, span in ended.items() if span.left_out}
