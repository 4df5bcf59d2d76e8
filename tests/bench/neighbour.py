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
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from tests.bench.blk_frontend import BlkFrontend, DeviceFaultError, Job
from tests.bench.run import choose_cpus
from tests.bench.servers import NULL_DISK, SOCKET_NAME, Server, serve_command
from tests.bench.storage import make_file, warm_cache

MIB: Final = 1 << 20
SECONDS: Final = 1.0
ROUNDS: Final = 5
SIZE: Final = 128 * MIB
GOAL_US: Final = 2000.0
"""The neighbour's p99 may be so much worse than on a quiet worker."""

Kind = Literal["memory", "tmpfs", "cached", "direct", "python"]


@dataclass(frozen=True, slots=True)
class Greed:
    """What the greedy guest does. ``depth`` is for each of ``queues``."""

    title: str
    kind: Kind
    request_bytes: int
    depth: int
    queues: int = 1
    write_percent: int = 0


GREEDY: Final = (
    Greed("memory disk, 4 reads of 32 MiB in flight", "memory", 32 * MIB, 4),
    Greed("memory disk, 64 reads of 1 MiB", "memory", MIB, 64),
    Greed("memory disk, 128 reads of 4 KiB", "memory", 4096, 128),
    Greed("tmpfs, 4 reads of 32 MiB", "tmpfs", 32 * MIB, 4),
    Greed("page cache, 4 reads of 32 MiB", "cached", 32 * MIB, 4),
    Greed("page cache, 4 writes of 32 MiB", "cached", 32 * MIB, 4, write_percent=100),
    Greed("disk (O_DIRECT), 4 queues with 128 reads of 16 KiB each", "direct", 16384, 128, queues=4),
    Greed("Python device, 64 reads of 1 MiB, the neighbour another one", "python", MIB - 512, 64),
)


@dataclass(frozen=True, slots=True)
class Felt:
    """Latencies of the neighbour in microseconds; medians over the rounds, and the largest of all."""

    p50: float
    p99: float
    most: float


def _device(name: str, socket: Path, kind: Kind, folder: Path, queues: int) -> list[str]:
    lines = [f"[devices.{name}]", f'socket = "{socket}"', f"queues = {queues}"]
    if kind == "python":
        return [*lines, f'type = "{NULL_DISK}"', f"size = {SIZE}"]
    lines += ['type = "blk"', 'worker = "w0"']
    if kind == "memory":
        return [*lines, 'backend = "memory"', f"size = {SIZE}"]
    return [*lines, f'path = "{folder / "disk.img"}"', f"direct = {str(kind == 'direct').lower()}"]


@contextmanager
def _served(greed: Greed, cpu: int) -> Iterator[tuple[Server, Path]]:
    """The daemon with both devices, and the greedy one's socket."""
    with ExitStack() as stack:
        parent = "/dev/shm" if greed.kind == "tmpfs" else "/var/tmp"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hyperbell-bench-", dir=parent)))
        if greed.kind in ("tmpfs", "cached", "direct"):
            make_file(folder / "disk.img", SIZE)
            warm_cache(folder / "disk.img")
        quiet: Kind = "python" if greed.kind == "python" else "memory"
        lines = ["[daemon]", 'metrics = "off"', "[workers.w0]", f"cpus = [{cpu}]"]
        lines += _device("quiet", folder / SOCKET_NAME, quiet, folder, 1)
        lines += _device("greedy", folder / "greedy.sock", greed.kind, folder, greed.queues)
        server = stack.enter_context(Server("hyperbell", serve_command(folder, lines), folder, cpu))
        yield server, folder / "greedy.sock"


@contextmanager
def _at_work(greed: Greed, socket: Path) -> Iterator[None]:
    """The greedy guest is at work from the first answer it got until the end of the block."""
    with BlkFrontend(
        socket, greed.queues, request_max=greed.request_bytes, segment=min(greed.request_bytes, MIB)
    ) as guest:
        job = Job(
            requests=max(greed.depth, 8),
            depth=greed.depth,
            request_bytes=greed.request_bytes,
            write_percent=greed.write_percent,
            sleep=True,
            stall_seconds=30,
        )
        ending, failed = threading.Event(), []

        def work() -> None:
            try:
                while not ending.is_set():
                    guest.run(job)
            except DeviceFaultError as error:
                failed.append(error)

        guest.run(job)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
        if failed:
            raise failed[0]


def _feel(server: Server, seconds: float) -> Felt:
    with BlkFrontend(server.socket) as guest:
        result = guest.run(Job(seconds=seconds, depth=1, sleep=True, stall_seconds=30))
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
    with _served(greed, server_cpu) as (server, socket):
        for _ in range(rounds):
            alone.append(_feel(server, seconds))
            with _at_work(greed, socket):
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
        alone, beside = measure(greed, server_cpu)
        print(line("(nothing)", alone))
        print(line(greed.title, beside, alone), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
