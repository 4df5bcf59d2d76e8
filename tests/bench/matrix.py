"""What is measured: back ends, loads, and the bars that the figures are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from tests.bench.measure import Idle, Load, Sample

OURS: Final = "hyperbell"
PACKED: Final = "hyperbell packed"
QEMU_IO_URING: Final = "qemu io_uring"
QEMU_THREADS: Final = "qemu threads"

BackEnd = Literal["null", "python", "ram", "disk", "cached"]
BACK_ENDS: Final[Mapping[BackEnd, str]] = {
    "null": "null back end (no storage at all)",
    "python": "null back end, hyperbell's written in Python (a device of the kit, tests/bench/null_disk.py)",
    "ram": "RAM-backed file (buffered, as tmpfs has no other way)",
    "disk": "file on disk, direct (O_DIRECT, the host's page cache is not used)",
    "cached": "file on disk, buffered, all of it in the host's page cache",
}

DEPTHS: Final = (1, 32, 128)
SEQUENTIAL_BYTES: Final = 128 * 1024
SEQUENTIAL_DEPTH: Final = 8

IOPS_BAR: Final = 2.0
CPU_BAR: Final = 0.5
P50_BAR: Final = 0.8
PYTHON_BAR: Final = 100_000
"""Requests a second of a device in Python, in batches."""
IDLE_BAR_SECONDS: Final = 0.001
"""Over the whole time that is watched. Reading the figures costs the server nothing, so a sleeping one has 0."""

Results = Mapping[BackEnd, Mapping[Load, Mapping[str, Sample]]]


def full_matrix(back_ends: Mapping[BackEnd, str]) -> dict[BackEnd, list[Load]]:
    """Every load on each of ``back_ends``; two queues are left out where they would say nothing new."""
    matrix: dict[BackEnd, list[Load]] = {}
    for back_end in back_ends:
        queues = (1,) if back_end in ("cached", "python") else (1, 2)
        loads = [Load("random", 4096, n, depth, sleep) for n in queues for depth in DEPTHS for sleep in (False, True)]
        loads += [Load("sequential", SEQUENTIAL_BYTES, 1, SEQUENTIAL_DEPTH, sleep) for sleep in (False, True)]
        matrix[back_end] = loads
    return matrix


def quick_matrix(back_ends: Mapping[BackEnd, str]) -> dict[BackEnd, list[Load]]:
    """What the bars need with one queue, and one load of each other kind."""
    both = (False, True)
    sequential = Load("sequential", SEQUENTIAL_BYTES, 1, SEQUENTIAL_DEPTH, sleep=False)
    quick: dict[BackEnd, list[Load]] = {
        "null": [Load("random", 4096, 1, depth, sleep) for depth in DEPTHS for sleep in both],
        "python": [Load("random", 4096, 1, depth, sleep=True) for depth in DEPTHS],
        "ram": [*(Load("random", 4096, 1, depth, sleep) for depth in (1, 32) for sleep in both), sequential],
        "disk": [Load("random", 4096, 1, 32, sleep=False)],
        "cached": [Load("random", 4096, 1, 32, sleep=False)],
    }
    return {back_end: quick[back_end] for back_end in back_ends}


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise and whether the figures keep it."""

    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.text}"


def ratio(ours: float, theirs: float) -> float:
    """``ours / theirs``; infinite when theirs is 0."""
    return ours / theirs if theirs else float("inf")


def check_bars(results: Results, idle: Mapping[str, Idle]) -> list[Bar]:
    """Every bar that these results can be held against, io_uring being the one to beat."""
    bars = []
    for back_end, loads in results.items():
        for load, samples in loads.items():
            if back_end == "python" and load.depth == max(DEPTHS):
                iops = samples[OURS].iops
                text = f"python, {load.title}: {iops:,.0f} requests a second (bar {PYTHON_BAR:,})"
                bars.append(Bar(text, iops >= PYTHON_BAR))
            elif QEMU_IO_URING in samples and load.order == "random":
                bars += _check_load(back_end, load, samples[OURS], samples[QEMU_IO_URING])
    if OURS in idle:
        seen = idle[OURS]
        used = f"{seen.cpu_seconds * 1000:.3f} ms of CPU and {seen.wakeups} wake-ups in {seen.seconds:g} s"
        bars.append(Bar(f"idle: {used} (bar: none)", seen.cpu_seconds <= IDLE_BAR_SECONDS))
    return bars


def _check_load(back_end: BackEnd, load: Load, ours: Sample, theirs: Sample) -> list[Bar]:
    bars = []
    iops = ratio(ours.iops, theirs.iops)
    cpu = ratio(ours.cpu_s_per_million, theirs.cpu_s_per_million)
    p50 = ratio(ours.p50_us, theirs.p50_us)
    if back_end == "ram" and load.depth == 32:
        text = (
            f"ram, {load.title}: {iops:.2f} times the IOPS (bar {IOPS_BAR:g}) at {cpu:.2f} of the CPU (bar {CPU_BAR:g})"
        )
        bars.append(Bar(text, iops >= IOPS_BAR and cpu <= CPU_BAR))
    if back_end == "null":
        bars.append(Bar(f"null, {load.title}: {iops:.2f} times the IOPS (bar 1)", iops >= 1))
    if back_end in ("null", "ram") and load.depth == 1 and not load.sleep:
        bars.append(Bar(f"{back_end}, {load.title}: p50 is {p50:.2f} of theirs (bar {P50_BAR:g})", p50 <= P50_BAR))
    return bars
