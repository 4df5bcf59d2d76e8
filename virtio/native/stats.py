"""What a backend counts, as plain values read from the data plane without a lock.

Durations are kept in log2 buckets: bucket ``k`` counts what took less than ``DURATION_BOUNDS[k]`` seconds
and at least the bound before it; the last bucket has no upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Final

HISTOGRAM_BUCKETS: Final = 25
"""Buckets of a latency histogram, the unbounded one included (DP_HISTOGRAM_BUCKETS in the data plane)."""

OPS_MAX: Final = 8
"""Operations that are told apart on one queue (DP_QUEUE_OPS in the data plane)."""

DURATION_BOUNDS: Final[tuple[float, ...]] = tuple((1 << (10 + k)) / 1e9 for k in range(HISTOGRAM_BUCKETS - 1))
"""Upper bounds in seconds of all but the last bucket: 1.024 us, 2.048 us, ... 8.6 s."""


@dataclass(frozen=True, slots=True)
class OpStats:
    """Counts of one operation (say ``read``) on one queue since the device was made."""

    requests: int
    errors: int
    bytes: int
    duration_buckets: tuple[int, ...]
    duration_sum_seconds: float


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Counts of one queue. ``inflight`` and ``oldest_age_seconds`` are of this moment, the rest only grow."""

    queue: int
    doorbells: Mapping[str, int]
    """How often each kind of doorbell rang, by its label (``virtio.waist.Doorbell``)."""
    wakeups: int
    empty_wakeups: int
    notifications_sent: int
    notifications_suppressed: int
    inflight: int
    oldest_age_seconds: float
    running: bool
    broken: bool
    ops: Mapping[str, OpStats]
    notifications_lost: int = 0
    """Of those sent: nobody was at the other end of the call fd."""
    guest_duration_buckets: tuple[int, ...] = (0,) * HISTOGRAM_BUCKETS
    """How long requests took as the guest feels it: from when they were available to their completion."""
    guest_duration_sum_seconds: float = 0.0

    @property
    def kicks(self) -> int:
        """How often the driver rang, by whatever doorbell."""
        return sum(self.doorbells.values())


def quantile_bound(buckets: Sequence[int], share: float) -> float | None:
    """A bound that this share of the durations is below, in seconds: of a bucket, so at most twice the quantile.

    Infinite in the last bucket; None where nothing was counted.
    """
    total = sum(buckets)
    if not total:
        return None
    for bound, below in zip((*DURATION_BOUNDS, inf), accumulate(buckets), strict=True):
        if below >= share * total:
            return bound
    raise AssertionError("the last bucket has all of them")


@dataclass(frozen=True, slots=True)
class Lost:
    """How many frames were lost on their way from (``transmit``) or to (``receive``) the guest, and why."""

    direction: str
    reason: str
    frames: int


@dataclass(frozen=True, slots=True)
class StorageErrors:
    """How often the storage answered an operation with this errno (by its name)."""

    op: str
    errno: str
    count: int


@dataclass(frozen=True, slots=True)
class Storage:
    """A disk's storage. ``flush_failed``: the errno of the flush that failed, after which none may succeed.

    ``reopened``: how often its image was opened again while the daemon ran, so that flushes might succeed again.
    ``stopped``: operation and errno of the request because of which requests are kept, ``kept`` of them now.
    ``retries``: how often they were tried again.
    """

    errors: tuple[StorageErrors, ...]
    flush_failed: str | None
    reopened: int = 0
    stopped: str | None = None
    kept: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class BackendStats:
    """One device's queues, and which features its driver accepted (0 before negotiation)."""

    device: str
    type: str
    driver_features: int
    queues: tuple[QueueStats, ...]
    lost: tuple[Lost, ...] = ()
    """Of a network interface: every reason, also those that never came about."""
    link_up: bool | None = None
    """Of a network interface."""
    storage: Storage | None = None
    """Of a disk."""


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One native worker thread. ``reactor`` is ``io_uring`` or ``epoll``, ``reason`` why it is not another."""

    name: str
    reactor: str
    wakeups: int
    poll_hits: int
    poll_misses: int
    cpu_seconds: float
    reason: str = ""
