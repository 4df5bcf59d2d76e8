"""What an operator reads of a disk whose storage fails: a line for each kind of error, few however many come."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from virtio.native.disk import FILE_ENDED

QUIET_SECONDS: Final = 60.0
"""After a line about one kind of error of one disk, the next ones are only counted for so long."""

Kind = tuple[str, str]
"""An operation and the name of an errno."""


def explain(name: str) -> str:
    """The errno ``name`` in words."""
    if name == FILE_ENDED:
        return "the file ends before the disk does"
    number = getattr(errno, name, None)
    return os.strerror(number) if isinstance(number, int) else f"error {name}"


@dataclass(slots=True)
class _Told:
    count: int  # how many errors of its kind were reported
    until: float  # no line before


class StorageLog:
    """Decides which lines are due, by the counts of errors and a clock that ``now`` reads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._told: dict[Kind, _Told] = {}
        self._pending: Mapping[Kind, int] = {}

    def lines(self, counts: Mapping[Kind, int]) -> Iterator[dict[str, Any]]:
        """The lines that are due now, each as the values to log."""
        now = self._now()
        self._pending = {
            kind: count for kind, count in counts.items() if kind not in self._told or count > self._told[kind].count
        }
        for kind, count in [*self._pending.items()]:
            told = self._told.get(kind, _Told(0, now))
            if told.until <= now:
                op, name = kind
                yield {"op": op, "errno": name, "error": explain(name), "times": count - told.count}
                self._told[kind] = _Told(count, now + QUIET_SECONDS)
                self._pending = {other: n for other, n in self._pending.items() if other != kind}

    def due(self) -> float:
        """Seconds until a line about what was only counted is due; infinite: nothing was."""
        return min((self._told[kind].until - self._now() for kind in self._pending), default=math.inf)
