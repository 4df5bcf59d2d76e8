"""What the metrics show of a vhost-user device's connection."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class ConnectionStats:
    """Counters since the server began, written by the server's tasks only.

    ``since`` is the wall clock time (seconds) at which ``connected`` last changed.
    ``hears_changes``: the front-end has agreed to be told of changes of the config space.
    ``reconnects`` counts connections after the first. The keys of ``protocol_errors`` are names from
    the message tables, so there is a fixed number of them.
    """

    connected: bool = False
    connections: int = 0
    reconnects: int = 0
    refused: int = 0
    protocol_errors: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    memory_regions: int = 0
    since: float = field(default_factory=time.time)
    hears_changes: bool = False

    def begin(self) -> None:
        self.connected = True
        self.reconnects += self.connections > 0
        self.connections += 1
        self.since = time.time()

    def end(self) -> None:
        self.connected = False
        self.memory_regions = 0
        self.hears_changes = False
        self.since = time.time()
