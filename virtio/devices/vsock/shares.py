"""Places that a guest, its host and other guests of its group take: how many of them another guest may have.

The guest itself and the host may take any place that is free. Another guest has at most as many as it leaves free, and
the other guests together leave an eighth. So no guest of a group, however fast it asks, keeps the host or a further
guest away from this one.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import structlog

from virtio.clients import REMEDY, shortages
from virtio.devices.vsock.packet import CID_HOST

BUFFER: Final = 256 * 1024
"""What the guest may send on one connection before it is taken (Linux's own default), and the longest message."""
BUFFER_OF_MANY: Final = 32 * 1024
"""The same for connections beyond ``FEW``: so all of them together hold some 60 MiB at most."""
FEW: Final = 128
CONNECTION: Final = "a connection of a vsock guest"
"""As the metric of shortages calls it."""


class Shares:
    """``limit`` places of the guest ``cid``."""

    def __init__(self, limit: int, cid: int) -> None:
        self._limit = limit
        self._kept = limit // 8
        self._preferred = (cid, CID_HOST)
        self._taken: Counter[int] = Counter()
        self._total = 0

    def take(self, cid: int) -> bool:
        """A place for ``cid``; False: there is none, or it has its share."""
        free = self._limit - self._total
        if cid not in self._preferred:
            free -= self._kept + self._taken[cid]
        if free <= 0:
            return False
        self._taken[cid] += 1
        self._total += 1
        return True

    def give_back(self, cid: int) -> None:
        """A place that ``cid`` took is free again."""
        self._total -= 1
        self._taken[cid] -= 1
        if not self._taken[cid]:
            del self._taken[cid]

    @property
    def is_full(self) -> bool:
        return self._total >= self._limit

    def is_held_back(self, cid: int) -> bool:
        """``cid`` was refused a place although there is a free one."""
        return self._total < self._limit and cid not in self._preferred

    def clear(self) -> None:
        self._taken.clear()
        self._total = 0


class ConnectionShares:
    """The connections of the guest ``cid``, and which of them have a large buffer."""

    def __init__(self, device: str, connections: int, cid: int) -> None:
        self._cid = cid
        self._connections = connections
        self._places = Shares(connections, cid)
        self._large = Shares(FEW, cid)
        self._log = structlog.get_logger().bind(device=device)
        self._told: set[int] = set()
        self._lowered = False
        self._told_of_descriptors = False

    def lower(self, connections: int) -> None:
        """This process has descriptors for so many connections, and no more. Before the first one."""
        self._lowered = connections < self._connections
        self._places = Shares(min(connections, self._connections), self._cid)

    def take(self, cid: int) -> int | None:
        """The size of the buffer of one more connection, which ``cid`` opens; None: there is no place for it."""
        if self._places.take(cid):
            return BUFFER if self._large.take(cid) else BUFFER_OF_MANY
        if self._lowered and self._places.is_full:
            shortages[CONNECTION] += 1
            if not self._told_of_descriptors:
                self._told_of_descriptors = True  # likewise
                self._log.warning(
                    "a guest's connections are used up: the process has too few descriptors", remedy=REMEDY
                )
        elif self._places.is_held_back(cid) and cid not in self._told:
            self._told.add(cid)  # one line for each guest until this one is reset
            self._log.warning("a guest has its share of another guest's connections", peer_cid=cid)
        return None

    def give_back(self, cid: int, buffer_size: int) -> None:
        self._places.give_back(cid)
        if buffer_size == BUFFER:
            self._large.give_back(cid)

    def clear(self) -> None:
        self._places.clear()
        self._large.clear()
        self._told.clear()
        self._told_of_descriptors = False
