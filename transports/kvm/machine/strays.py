"""Doorbells that ring nothing: a guest may make millions of them, and each costs it, not us. They are counted by the
vCPUs' threads, which tell nobody; here somebody looks now and then, and says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import structlog
import trio

LOOK_SECONDS: Final = 2.0
QUIET_SECONDS: Final = 600.0
"""After a line about strays, how long there is none about more of them."""


@dataclass(slots=True)
class Source:
    """One counter of strays: what to say of them, and how many there are now."""

    event: str
    count: Callable[[], int]
    device: str | None = None
    told: int = 0
    quiet_until: float = -math.inf


class StrayWatch:
    """A line at the first stray of each source, then at most one in ``QUIET_SECONDS``, with how many it were so far."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = tuple(sources)
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Look at the counters, until cancelled."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            self.look()

    def look(self, *, last: bool = False) -> None:
        """``last``: the guest has ended, so what was not told yet is told now."""
        now = trio.current_time()
        for source in self._sources:
            count = source.count()
            if count > source.told and (last or now >= source.quiet_until):
                source.told, source.quiet_until = count, now + QUIET_SECONDS
                whose = {"device": source.device} if source.device is not None else {}
                self._log.warning(f"{source.event}: ignored, the others go on", **whose, times=count)
