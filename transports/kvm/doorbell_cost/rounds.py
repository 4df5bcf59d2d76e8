"""Measures what each kind of doorbell costs on this host: all kinds in turns, round after round."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

from transports.hypercall import RESERVED_BELL, connection_id
from transports.kvm.cpu.cpuid import PlatformKey
from transports.kvm.cpu.host import host_loop_cycles, speaks_vmmcall, two_cpus, usable_cpus
from transports.kvm.doorbell_cost.guest import (
    GREETING,
    RINGS_MAX,
    Ring,
    Step,
    StepResult,
    acknowledging,
    make_ram,
    run_steps,
    running_on,
    settle,
    times,
)
from transports.kvm.doorbell_cost.statistics import Summary, percentile, summarize
from transports.kvm.host import KVM_PATH
from transports.kvm.vm.vmm import Vm, VmSetup
from virtio.errors import HostError
from virtio.fd import OwnedFd, take_count

ROUNDS: Final = 24
BUDGET_SECONDS: Final = 2.4  # of all rounds together
LIMIT_SECONDS: Final = 6.0  # where the warm-up misjudged the machine, fewer rounds must do
ROUNDS_MIN: Final = 4
WARM_UP_ROUNDS: Final = 2  # the first one wakes up everything
WARM_UP_RINGS: Final = 20
RINGS_MIN: Final = 6  # of a round, however slow the machine
LOOP_ITERATIONS: Final = 2000

KERNEL: Final = "kernel"
THREAD: Final = "thread"

NOTHING: Final = "nothing"  # not reported as a kind: what is measured without any ring

KEY: Final = 0x5A17C3  # of a VM that lives for seconds and has nothing to hide
BELLS: Final = {KERNEL: 0x100, THREAD: 0x101}  # below the first port: a device without one
MMIO: Final = {KERNEL: 0xD000_0000, THREAD: 0xD000_2000}
MMIO_MATCH: Final = {KERNEL: 0xD000_1000, THREAD: 0xD000_3000}
PIO: Final = {KERNEL: 0x1000, THREAD: 0x1002}
_EXIT_PORT: Final = 0x2000  # nobody's: the vCPU's thread in userspace goes on at once
_VALUE: Final = 1  # what rings where the value counts


@dataclass(frozen=True, slots=True)
class KindFigures:
    """One kind of doorbell, or of exit: cycles a ring to each target, or why there are none."""

    kind: str
    kernel: Summary | None = None
    thread: Summary | None = None
    why_not: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """All kinds. ``stamps``: cycles of taking two time stamps, which the figures no longer hold.

    ``guest_loop`` and ``host_loop``: cycles of the same plain loop in the guest and in this process.
    """

    kinds: tuple[KindFigures, ...]
    tsc_khz: float
    stamps: int
    guest_loop: int
    host_loop: int
    placement: str


@dataclass(slots=True)
class _Lane:
    """One kind to one target: its step, its rounds, its rings that the eventfd saw."""

    kind: str
    target: str
    step: Step
    fd: OwnedFd | None = None
    rounds: list[Sequence[int]] = field(default_factory=list)
    why_not: str | None = None


async def measure(kvm_path: str = KVM_PATH) -> Measurement:
    """Some seconds' work. ``HostError``: there is no VM to be had here."""
    pair = two_cpus(usable_cpus())
    vcpu_cpu, waiter_cpu = pair if pair is not None else (None, None)
    no_hypercall = await _why_no_hypercall(kvm_path)
    with ExitStack() as stack:
        ram = stack.enter_context(make_ram())
        vm = stack.enter_context(Vm(VmSetup(ram, platform=_platform(no_hypercall), kvm_path=kvm_path)))
        bell = stack.enter_context(_eventfd())
        lanes = [*_doorbell_lanes(vm, stack, bell, hypercall=no_hypercall is None), *_baseline_lanes()]
        with running_on(waiter_cpu):
            stack.enter_context(acknowledging(ram, bell))
        with running_on(vcpu_cpu):
            run = _Run(vm, lanes, greet=no_hypercall is None)
            await run.all_rounds()
    kinds = tuple(run.figures(kind) for kind in dict.fromkeys(lane.kind for lane in lanes) if kind != NOTHING)
    if no_hypercall is not None:
        kinds = (*kinds[:3], KindFigures("hypercall", why_not=no_hypercall), *kinds[3:])
    return Measurement(
        kinds=kinds,
        tsc_khz=run.tsc_khz(),
        stamps=run.stamps,
        guest_loop=run.guest_loop,
        host_loop=host_loop_cycles(LOOP_ITERATIONS),
        placement=_placement(pair),
    )


def _placement(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return "one usable CPU, shared by the guest and the thread it rings"
    return f"the guest on CPU {pair[0]}, the thread it rings on CPU {pair[1]}"


# Doorbells


def _platform(no_hypercall: str | None) -> PlatformKey | None:
    return PlatformKey(KEY) if no_hypercall is None else None


@contextmanager
def _eventfd() -> Iterator[OwnedFd]:
    with OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as fd:
        yield fd


def _hypercall(bell: int) -> Step:
    return Step(Ring.VMMCALL if speaks_vmmcall() else Ring.VMCALL, connection_id(bell, KEY))


async def _why_no_hypercall(kvm_path: str) -> str | None:
    """Tried in a VM of its own: where a hypercall goes wrong, the guest may not come back from it."""
    with ExitStack() as stack:
        ram = stack.enter_context(make_ram())
        vm = stack.enter_context(Vm(VmSetup(ram, platform=PlatformKey(KEY), kvm_path=kvm_path)))
        if vm.why_no_hypercall is not None:
            return vm.why_no_hypercall
        fd = stack.enter_context(_eventfd())
        try:
            vm.hypercall_id(connection_id(BELLS[KERNEL], KEY), fd)
            _, ring, reserved = await run_steps(
                vm, [GREETING, _hypercall(BELLS[KERNEL]), Step(_hypercall(0).kind, RESERVED_BELL ^ KEY)]
            )
        except HostError as error:
            return str(error)
        if ring.refused:
            return f"the hypercall's status is {ring.status:#x} instead of 0"
        if not reserved.refused:
            return "a hypercall with an id that nobody registered has status 0, so that it says nothing"
    return None


def _doorbell_lanes(vm: Vm, stack: ExitStack, bell: OwnedFd, *, hypercall: bool) -> Iterator[_Lane]:
    """Every kind to both targets: in the kernel each has an eventfd of its own, and all end at the one thread."""
    for target in (KERNEL, THREAD):
        threaded = target == THREAD

        def eventfd(threaded: bool = threaded) -> OwnedFd:
            return bell if threaded else stack.enter_context(_eventfd())

        store = Ring.STORE
        lane = _Lane("mmio", target, Step(store, MMIO[target], _VALUE, to_thread=threaded), eventfd())
        vm.ioeventfd_mmio(MMIO[target], 0, None, _of(lane))
        yield lane
        lane = _Lane("mmio-match", target, Step(store, MMIO_MATCH[target], _VALUE, to_thread=threaded), eventfd())
        vm.ioeventfd_mmio(MMIO_MATCH[target], 4, _VALUE, _of(lane))
        yield lane
        lane = _Lane("pio", target, Step(Ring.OUT, PIO[target], _VALUE, to_thread=threaded), eventfd())
        vm.ioeventfd_pio(PIO[target], 2, _VALUE, _of(lane))
        yield lane
        if hypercall:
            call = _hypercall(BELLS[target])
            lane = _Lane("hypercall", target, Step(call.kind, call.address, to_thread=threaded), eventfd())
            vm.hypercall_id(call.address, _of(lane))
            yield lane


def _of(lane: _Lane) -> OwnedFd:
    assert lane.fd is not None
    return lane.fd


def _baseline_lanes() -> Iterator[_Lane]:
    yield _Lane("exit", KERNEL, Step(Ring.OUT, _EXIT_PORT, _VALUE))
    yield _Lane("cpuid", KERNEL, Step(Ring.CPUID))
    yield _Lane(NOTHING, KERNEL, Step(Ring.NOTHING))


# Rounds


class _Run:
    """The rounds of one measurement."""

    def __init__(self, vm: Vm, lanes: Sequence[_Lane], *, greet: bool) -> None:
        self._vm = vm
        self._lanes = lanes
        self._before = [times(Step(Ring.LOOP, LOOP_ITERATIONS), 3), *([GREETING] if greet else [])]
        self._loops: list[int] = []
        self._ticks_per_second = 1.0  # of the guest's counter, roughly, by the last run
        self._clock: list[tuple[int, float]] = []  # the guest's counter and the host's clock, at the end of each run

    async def all_rounds(self) -> None:
        """The second round of the warm-up tells how slow each kind is, and so how often it is rung in a round."""
        for _ in range(WARM_UP_ROUNDS):
            results = await self._round(self._lanes, dict.fromkeys(map(id, self._lanes), WARM_UP_RINGS))
        for lane in self._lanes:
            lane.rounds.clear()
        (nothing,) = (results[id(lane)] for lane in self._lanes if lane.kind == NOTHING)
        counts = {id(lane): self._rings(results[id(lane)], nothing.cycles_each) for lane in self._lanes}
        begun, order = time.perf_counter(), random.Random(0)
        for number in range(ROUNDS):
            if number >= ROUNDS_MIN and time.perf_counter() - begun > LIMIT_SECONDS:
                break
            alive = [lane for lane in self._lanes if lane.why_not is None]
            # In another order each time: what ran before makes a difference, above all to a thread that slept long.
            await self._round(order.sample(alive, len(alive)), counts)

    def _rings(self, warm_up: StepResult, around: float) -> int:
        """How many fit into a round: by the median, for one ring that was disturbed says nothing of the others.

        ``around`` are the cycles that the guest itself spends on a ring, which an emulator makes many of.
        """
        samples = sorted(warm_up.samples)
        each = around + (percentile(samples, 50) if samples else 0)
        share = BUDGET_SECONDS / ROUNDS / len(self._lanes)
        return max(RINGS_MIN, min(RINGS_MAX, int(share * self._ticks_per_second / each)))

    async def _round(self, lanes: Sequence[_Lane], counts: Mapping[int, int]) -> dict[int, StepResult]:
        steps = [*self._before, *(times(lane.step, counts[id(lane)]) for lane in lanes)]
        started = time.perf_counter()
        results = await run_steps(self._vm, steps)
        ended = time.perf_counter()
        self._clock.append((results[-1].end, ended))
        self._ticks_per_second = max(1.0, (results[-1].end - results[0].begin) / (ended - started))
        self._loops.extend(results[0].samples)
        own = dict(zip(map(id, lanes), results[len(self._before) :], strict=True))
        for lane in lanes:
            await self._take(lane, own[id(lane)])
        return own

    async def _take(self, lane: _Lane, result: StepResult) -> None:
        lane.rounds.append(result.samples)
        if result.refused:
            lane.why_not = f"{result.refused} rings were refused, the last with status {result.status:#x}"
        elif result.unanswered and not await settle(self._vm.setup.ram):
            lane.why_not = "a ring never reached the thread that waits for it"
        elif lane.target == KERNEL and lane.fd is not None:
            arrived = take_count(lane.fd.fileno())
            if arrived != len(result.samples):
                lane.why_not = f"of {len(result.samples)} rings {arrived} reached the eventfd"

    # What came out

    def figures(self, kind: str) -> KindFigures:
        lanes = {lane.target: lane for lane in self._lanes if lane.kind == kind}
        why_not = next((lane.why_not for lane in lanes.values() if lane.why_not is not None), None)
        if why_not is not None:
            return KindFigures(kind, why_not=why_not)
        summaries = {target: summarize(lane.rounds, self.stamps) for target, lane in lanes.items()}
        return KindFigures(kind, kernel=summaries[KERNEL], thread=summaries.get(THREAD))

    @property
    def stamps(self) -> int:
        (lane,) = (lane for lane in self._lanes if lane.kind == NOTHING)
        summary = summarize(lane.rounds)
        return summary.median if summary is not None else 0

    @property
    def guest_loop(self) -> int:
        return min(self._loops)

    def tsc_khz(self) -> float:
        """The guest's counter by the host's clock, from the end of the first run to that of the last."""
        (first, begin), (last, end) = self._clock[0], self._clock[-1]
        return (last - first) / (end - begin) / 1000
