"""What a guest feels of a greedy neighbour: ``python -m tests.bench.neighbour``.

One daemon with one worker serves a memory disk whose driver has one small read in flight at a time, and beside it
a device that another guest uses as hard as it can. Each kind of greed has a row; quiet and greedy runs take turns, so
that what the machine does meanwhile is in both. Devices in Python are one another's neighbours on the event loop.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.blk_frontend import BlkFrontend, Job
from tests.bench.greed import (
    GREEDY,
    STALL_SECONDS,
    CannotBeHadError,
    Greed,
    at_work,
    device_lines,
    storage,
)
from tests.bench.run import choose_cpus
from tests.bench.servers import SOCKET_NAME, Server, serve_command

SECONDS: Final = 1.0
ROUNDS: Final = 5
GOAL_US: Final = 2000.0
"""The neighbour's p99 may be so much worse than on a quiet worker."""


@dataclass(frozen=True, slots=True)
class Felt:
    """Latencies of the neighbour in microseconds; medians over the rounds, and the largest of all."""

    p50: float
    p99: float
    most: float


@contextmanager
def _served(greed: Greed, image: Path | None, cpu: int) -> Iterator[tuple[Server, Path]]:
    """The daemon with both devices, and the greedy one's socket."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-bench-") as name:
        folder = Path(name)
        lines = ["[daemon]", 'metrics = "off"', "[workers.w0]", f"cpus = [{cpu}]", f'reactor = "{greed.reactor}"']
        lines += device_lines("quiet", folder / SOCKET_NAME, greed.neighbour, None, 1)
        lines += device_lines("greedy", folder / "greedy.sock", greed.kind, image, greed.queues)
        with Server("hyperbell", serve_command(folder, lines), folder, cpu) as server:
            yield server, folder / "greedy.sock"


def _feel(server: Server, seconds: float) -> Felt:
    with BlkFrontend(server.socket) as guest:
        result = guest.run(Job(seconds=seconds, depth=1, sleep=True, stall_seconds=STALL_SECONDS))
    return Felt(result.percentile_us(50), result.percentile_us(99), result.latency_max_us)


def _middle(felt: Sequence[Felt]) -> Felt:
    return Felt(
        statistics.median(one.p50 for one in felt),
        statistics.median(one.p99 for one in felt),
        max(one.most for one in felt),
    )


def measure(greed: Greed, server_cpu: int, rounds: int = ROUNDS, seconds: float = SECONDS) -> tuple[Felt, Felt]:
    """What the neighbour feels alone, and beside ``greed``."""
    alone: list[Felt] = []
    beside: list[Felt] = []
    with storage(greed.kind) as disk, _served(greed, disk.image, server_cpu) as (server, socket):
        for _ in range(rounds):
            alone.append(_feel(server, seconds))
            with at_work(greed, socket, disk):
                beside.append(_feel(server, seconds))
    return _middle(alone), _middle(beside)


def line(title: str, felt: Felt, alone: Felt | None = None) -> str:
    """One row of the table."""
    row = f"{title:60} {felt.p50:10,.0f} {felt.p99:10,.0f} {felt.most:12,.0f}"
    if alone is None:
        return row
    return f"{row}  {'ok' if felt.p99 - alone.p99 <= GOAL_US else 'MISSED'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every kind of greed and print; the words in ``argv`` choose among the titles."""
    wanted = sys.argv[1:] if argv is None else argv
    server_cpu, guest_cpu = choose_cpus(None)
    os.sched_setaffinity(0, {guest_cpu})
    print("neighbour: one 4 KiB read at a time, sleeping driver, µs")
    print(f"goal: p99 within {GOAL_US / 1000:g} ms of the quiet one")
    print(f"{'beside':60} {'p50':>10} {'p99':>10} {'max':>12}")
    for greed in GREEDY:
        if wanted and not any(word in greed.title for word in wanted):
            continue
        try:
            alone, beside = measure(greed, server_cpu)
        except CannotBeHadError as error:
            print(f"{greed.title}: not measured: {error}")
            continue
        print(line("(nothing)", alone))
        print(line(greed.title, beside, alone), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
