"""What a run measured: sums over the queues and the latency histogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.build import load_frontend


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run, all queues together.

    ``histogram``: pairs of an upper bound in nanoseconds and the number of requests up to it, ascending; a bucket is
    at most 1/64 wide. Percentiles come from it.
    """

    requests: int
    writes: int
    errors: int
    odd_lengths: int
    """Requests whose used length was not the number of bytes the device wrote."""
    kicks: int
    kicks_suppressed: int
    interrupts: int
    """Wake-ups of a sleeping driver by its call fds."""
    empty_interrupts: int
    calls: int
    """Sum of the call fds' counts; of a polling driver: all unwanted."""
    elapsed_s: float
    latency_mean_us: float
    latency_max_us: float
    requests_of_queue: tuple[int, ...]
    histogram: tuple[tuple[int, int], ...]

    @property
    def iops(self) -> float:
        """Requests a second."""
        return self.requests / self.elapsed_s if self.elapsed_s else 0.0

    def percentile_us(self, percent: float) -> float:
        """The latency that ``percent`` of the requests did not exceed, in microseconds (upper bound of its bucket)."""
        wanted = self.requests * percent / 100
        seen = 0
        for upper_ns, count in self.histogram:
            seen += count
            if seen >= wanted:
                return upper_ns / 1000
        return 0.0


def bucket_upper_ns(bucket: int, shift: int) -> int:
    """The largest latency that falls into ``bucket`` (see ``histogram_bucket`` in requests.c)."""
    parts = 1 << shift
    if bucket < parts:
        return bucket
    octave, part = divmod(bucket, parts)
    return ((parts + part + 1) << (octave - 1)) - 1


def merge_results(results: Sequence[Any]) -> RunResult:
    """Add up the ``struct fe_result`` of a run's queues."""
    _, lib = load_frontend()

    def total(name: str) -> int:
        return sum(getattr(result, name) for result in results)

    buckets: dict[int, int] = {}
    for result in results:
        for bucket, count in enumerate(result.histogram):
            if count:
                buckets[bucket] = buckets.get(bucket, 0) + count
    requests = total("requests")
    return RunResult(
        requests=requests,
        writes=total("writes"),
        errors=total("errors"),
        odd_lengths=total("odd_lengths"),
        kicks=total("kicks"),
        kicks_suppressed=total("kicks_suppressed"),
        interrupts=total("interrupts"),
        empty_interrupts=total("empty_interrupts"),
        calls=total("calls"),
        elapsed_s=max(result.elapsed_ns for result in results) / 1e9,
        latency_mean_us=total("latency_sum_ns") / requests / 1000 if requests else 0.0,
        latency_max_us=max(result.latency_max_ns for result in results) / 1000,
        requests_of_queue=tuple(result.requests for result in results),
        histogram=tuple(
            (bucket_upper_ns(bucket, lib.FE_HISTOGRAM_SHIFT), buckets[bucket]) for bucket in sorted(buckets)
        ),
    )
