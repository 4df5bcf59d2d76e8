"""What the cycles of many rings come down to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Cycles a ring. ``spread``: from the 10th to the 90th percentile of the rounds' medians, beside the median."""

    median: int
    p99: int
    rings: int
    spread: float


def percentile(ordered: Sequence[int], percent: float) -> int:
    """The least value that at least ``percent`` of the sorted values do not exceed."""
    if not ordered:
        raise ValueError("no values")
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[min(len(ordered), max(1, int(rank))) - 1]


def summarize(rounds: Sequence[Sequence[int]], overhead: int = 0) -> Summary | None:
    """All rounds together, each ring less the ``overhead`` of measuring it; ``None`` when there were no rings."""
    taken = [sorted(samples) for samples in rounds if samples]
    if not taken:
        return None
    everything = sorted(sample for samples in taken for sample in samples)
    medians = sorted(percentile(samples, 50) for samples in taken)
    middle = percentile(everything, 50)
    spread = (percentile(medians, 90) - percentile(medians, 10)) / middle if middle else 0.0
    return Summary(
        median=max(0, middle - overhead),
        p99=max(0, percentile(everything, 99) - overhead),
        rings=len(everything),
        spread=spread,
    )
