"""Loads, samples and medians: one server, one load, one figure after the other, in turns."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal, Protocol

from tests.bench.blk_frontend import BlkFrontend, DeviceFaultError, Job
from tests.bench.connection import ConnectionFailedError
from tests.bench.servers import Server, ServerError

QUEUE_SIZE: Final = 256
KIB: Final = 1024
DISTURBED: Final = 0.1  # a run of which others took a larger share is worth doing again
FAULTS_FORGIVEN: Final = 2  # of a peer, in one run
SETTLE_SECONDS: Final = 1.0  # whatever polls for a while after the last request has ended it by then


@dataclass(frozen=True, slots=True)
class Load:
    """One row of the table. ``depth`` is for each queue; one thread drives all queues."""

    order: Literal["random", "sequential"]
    request_bytes: int
    queues: int
    depth: int
    sleep: bool

    @property
    def title(self) -> str:
        """As the tables name it."""
        queues = "1 queue" if self.queues == 1 else f"{self.queues} queues"
        return f"{self.request_bytes // KIB} KiB {self.order}, {queues}, depth {self.depth}, {self.driver}"

    @property
    def driver(self) -> str:
        """How the front-end waits."""
        return "sleeping" if self.sleep else "polling"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run of a load, or the median of several, says about a server."""

    iops: float
    p50_us: float
    p99_us: float
    cpu_s_per_million: float
    """CPU seconds that the server used for a million requests."""
    kicks_per_thousand: float
    calls_per_thousand: float
    """Interrupts that the device sent, for a thousand requests."""
    disturbed: float
    """The larger share of either CPU's time that other processes took."""

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return dict(asdict(self))


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a run takes, how often each is repeated, and how long the servers are watched when idle (seconds).

    ``retries``: how often a run that others disturbed is done again; the least disturbed one counts.
    """

    seconds: float
    warm_up: float
    rounds: int
    retries: int
    idle: float


@dataclass(frozen=True, slots=True)
class Idle:
    """A server with a connected front-end that asks for nothing."""

    seconds: float
    cpu_seconds: float
    wakeups: int


@dataclass(frozen=True, slots=True)
class Contender:
    """A server as one column of the tables; ``packed``: driven by packed rings instead of split ones."""

    name: str
    server: Server
    ours: bool
    packed: bool = False


class Log(Protocol):
    """What the measuring tells while it goes on."""

    def progress(self, text: str) -> None:
        """Something was measured."""

    def note(self, text: str) -> None:
        """Something that the report must mention."""


class Watch:
    """What a server used and what others took, from now to ``stop``."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._begin = self._look()

    def _look(self) -> tuple[float, float, float, float]:
        return time.monotonic(), self._server.cpu_seconds(), busy_seconds(self._server.cpu), waited_seconds()

    def stop(self) -> tuple[float, float]:
        """The server's CPU seconds, and the larger share of the two CPUs' time that neither side had."""
        elapsed, used, busy, waited = (now - then for now, then in zip(self._look(), self._begin, strict=True))
        return used, max(busy - used, waited, 0.0) / elapsed


def busy_seconds(cpu: int) -> float:
    """How long ``cpu`` ran processes, or the hypervisor kept it, since boot (``/proc/stat``, in ticks of 10 ms)."""
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *ticks = line.split()
        if name == f"cpu{cpu}":
            user, nice, system, steal = (int(ticks[index]) for index in (0, 1, 2, 7))
            return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")
    raise ServerError(f"/proc/stat knows no CPU {cpu}")


def waited_seconds() -> float:
    """How long the calling thread was ready to run while another had its CPU (``schedstat``)."""
    return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9


def run_once(contender: Contender, load: Load, timing: Timing) -> Sample:
    """One connection, one warm-up, one measured run."""
    server = contender.server
    server.check()
    job = Job(
        seconds=timing.warm_up,
        depth=load.depth,
        request_bytes=load.request_bytes,
        order=load.order,
        sleep=load.sleep,
    )
    with BlkFrontend(
        server.socket, load.queues, QUEUE_SIZE, request_max=load.request_bytes, packed=contender.packed
    ) as frontend:
        frontend.run(job)
        watch = Watch(server)
        result = frontend.run(replace(job, seconds=timing.seconds, choice_seed=2))
        cpu, disturbed = watch.stop()
        frontend.stop()
    requests = max(result.requests, 1)
    return Sample(
        iops=result.iops,
        p50_us=result.percentile_us(50),
        p99_us=result.percentile_us(99),
        cpu_s_per_million=cpu / requests * 1e6,
        kicks_per_thousand=result.kicks / requests * 1000,
        calls_per_thousand=result.calls / requests * 1000,
        disturbed=disturbed,
    )


def run_in_turns(contenders: Sequence[Contender], load: Load, timing: Timing, log: Log) -> dict[str, Sample]:
    """Medians by contender's name. Every round asks each of them once, and each round begins with another one."""
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    for turn in range(timing.rounds):
        first = turn % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            sample = run_undisturbed(contender, load, timing, log)
            samples[contender.name].append(sample)
            log.progress(f"{load.title}: {contender.name} {sample.iops:,.0f} IOPS")
    return {name: take_medians(taken) for name, taken in samples.items()}


def run_undisturbed(contender: Contender, load: Load, timing: Timing, log: Log) -> Sample:
    """Repeat a run that others disturbed, and one in which a peer stalled; a stall of our own daemon is an error."""
    best: Sample | None = None
    faults = 0
    for _ in range(1 + timing.retries + FAULTS_FORGIVEN):
        try:
            sample = run_once(contender, load, timing)
        except ConnectionFailedError as error:
            contender.server.check()
            raise ServerError(f"{contender.name}: {error}; it printed: {contender.server.last_words()}") from error
        except DeviceFaultError as error:
            faults += 1
            if contender.ours or faults > FAULTS_FORGIVEN:
                raise
            log.note(f"{contender.name} failed in a run that was then repeated: {error}")
            continue
        if best is None or sample.disturbed < best.disturbed:
            best = sample
        if best.disturbed <= DISTURBED or timing.retries == 0:
            break
    assert best is not None  # or the last fault was raised
    return best


def take_medians(samples: Sequence[Sample]) -> Sample:
    """The median of each figure by itself."""
    names = samples[0].as_dict()
    return Sample(**{name: statistics.median(getattr(sample, name) for sample in samples) for name in names})


def watch_idle(servers: Sequence[Server], seconds: float) -> dict[str, Idle]:
    """All servers at once, each with a connected front-end that has just had some work done and now is silent."""
    with ExitStack() as frontends:
        for server in servers:
            frontends.enter_context(BlkFrontend(server.socket)).run(Job(seconds=0.2, depth=32))
        time.sleep(SETTLE_SECONDS)
        before = [(server.cpu_seconds(), server.wakeups()) for server in servers]
        time.sleep(seconds)
        return {
            server.name: Idle(seconds, server.cpu_seconds() - cpu, server.wakeups() - wakeups)
            for server, (cpu, wakeups) in zip(servers, before, strict=True)
        }
