"""Reports of ``hyperbell doorbells`` for tests: figures as a machine might have them."""

from __future__ import annotations

from collections.abc import Mapping

from transports.kvm.doorbell_cost.rounds import KindFigures, Measurement
from transports.kvm.doorbell_cost.statistics import Summary

MEDIANS: Mapping[str, tuple[int, int | None]] = {
    "mmio": (1_500, 9_000),
    "mmio-match": (3_000, 10_500),
    "pio": (1_800, 9_300),
    "hypercall": (1_200, 8_700),
    "exit": (6_000, None),
    "cpuid": (900, None),
}
"""Cycles at 3 GHz, in the kernel and to a thread: 500 ns by MMIO, 600 ns by PIO, 400 ns by hypercall."""


def summary(median: int, spread: float = 0.01) -> Summary:
    return Summary(median=median, p99=2 * median, rings=40_000, spread=spread)


def measurement(
    medians: Mapping[str, tuple[int, int | None]] = MEDIANS,
    *,
    no_hypercall: str = "",
    guest_loop: int = 2_000,
    spread: float = 0.01,
    thread_spread: float = 0.01,
) -> Measurement:
    kinds = []
    for kind, (kernel, thread) in medians.items():
        if kind == "hypercall" and no_hypercall:
            kinds.append(KindFigures(kind, why_not=no_hypercall))
            continue
        rings = summary(thread, thread_spread) if thread is not None else None
        kinds.append(KindFigures(kind, kernel=summary(kernel, spread), thread=rings))
    return Measurement(
        kinds=tuple(kinds),
        tsc_khz=3e6,
        stamps=40,
        guest_loop=guest_loop,
        host_loop=2_000,
        placement="the guest on CPU 0, the thread it rings on CPU 1",
    )
