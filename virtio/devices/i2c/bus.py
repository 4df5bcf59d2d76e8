"""What an I2C device hands to its back ends: segments of a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import trio


class Segment(NamedTuple):
    """One message between a start and the next one. ``data`` is written; ``length`` bytes are read when ``read``."""

    address: int
    ten_bit: bool
    read: bool
    data: bytes = b""
    length: int = 0


class Bus(Protocol):
    """A bus with its chips."""

    async def transfer(self, segments: Sequence[Segment]) -> list[bytes]:
        """Carry out one transaction: as many results as there are segments that went well, then it ended.

        A result is what was read, or nothing of a segment that wrote. ``HostError``: none went well, for the host's
        own reasons.
        """

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...
    def close(self) -> None: ...
