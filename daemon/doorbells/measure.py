"""``hyperbell doorbells``: measures on this host, says what the figures are good for, prints and saves them."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, cast

import trio

from daemon.doorbells.report import DOORBELLS, Figure, Host, Kind, Measured, Reason, Report, save, to_json
from daemon.doorbells.table import render
from transports.kvm.cpu.host import EMULATOR, hypervisor_below, processor_name
from transports.kvm.doorbell_cost.rounds import KindFigures, Measurement, measure
from transports.kvm.doorbell_cost.statistics import Summary
from transports.kvm.host import KVM_PATH
from virtio.errors import HostError

SLOW_LOOP: Final = 4
"""A guest's loop that takes so many times as long as ours is not run by the processor."""

NOISY_SPREAD: Final = 0.2
NOISY_SPREAD_OF_A_THREAD: Final = 0.5  # waking one depends on how deeply its CPU slept
"""Rounds whose medians lie farther apart than this share of the median were disturbed."""


def run(*, as_json: bool, save_to: Path | None, kvm_path: str = KVM_PATH) -> bool:
    """Measure, print, save. Whether there was anything to be measured."""
    report = make_report(kvm_path)
    if as_json:
        print(to_json(report))
    else:
        print(render(report, shutil.get_terminal_size().columns, bold=_is_terminal()))
    if save_to is not None and report.measured_something:
        save(report, save_to)
    elif save_to is not None:
        print(f"hyperbell: nothing was measured, so {save_to} was not written", file=sys.stderr)
    return report.measured_something


def _is_terminal() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def make_report(kvm_path: str = KVM_PATH) -> Report:
    """Measure what can be measured; where nothing can, the report says why."""
    below = hypervisor_below()
    try:
        measurement = trio.run(measure, kvm_path)
    except HostError as error:
        reason = str(error)
        kinds = tuple(Measured(kind=kind, why_not=reason) for kind in DOORBELLS)
        return _report(kinds, below, "", 0.0, 0, ())
    return report_of(measurement, below)


def report_of(measurement: Measurement, below: str) -> Report:
    """The report of a measurement on a machine that is a guest of ``below`` ("": of none)."""
    return _report(
        tuple(_measured(kind, measurement.tsc_khz) for kind in measurement.kinds),
        below,
        measurement.placement,
        measurement.tsc_khz,
        measurement.stamps,
        tuple(reasons(measurement, below)),
    )


def _report(
    kinds: tuple[Measured, ...], below: str, placement: str, tsc_khz: float, stamps: int, why: tuple[Reason, ...]
) -> Report:
    return Report(
        hyperbell_doorbells=1,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=Host(processor=processor_name(), kernel=platform.release(), below=below, placement=placement),
        tsc_khz=tsc_khz,
        stamps_cycles=stamps,
        trustworthy=not why and any(kind.kernel is not None for kind in kinds),
        reasons=why,
        doorbells=kinds,
    )


def _measured(figures: KindFigures, tsc_khz: float) -> Measured:
    kind = cast(Kind, figures.kind)
    if figures.kernel is None:
        return Measured(kind=kind, why_not=figures.why_not or "no ring was answered in time")
    thread = _figure(figures.thread, tsc_khz) if figures.thread is not None else None
    return Measured(kind=kind, kernel=_figure(figures.kernel, tsc_khz), thread=thread)


def _figure(summary: Summary, tsc_khz: float) -> Figure:
    return Figure(
        median_ns=round(summary.median / tsc_khz * 1e6, 1),
        p99_ns=round(summary.p99 / tsc_khz * 1e6, 1),
        median_cycles=summary.median,
        p99_cycles=summary.p99,
        rings=summary.rings,
        spread=round(summary.spread, 4),
    )


def reasons(measurement: Measurement, below: str) -> Iterator[Reason]:
    """Everything that speaks against the figures, the worst first."""
    if below == EMULATOR:
        text = (
            f"this machine is itself emulated, by {EMULATOR}: no instruction takes here what it takes on a processor, "
            "and the kinds can be compared only roughly"
        )
        yield Reason(code="emulated-host", meaningless=True, text=text)
    slowness = measurement.guest_loop / max(1, measurement.host_loop)
    if slowness >= SLOW_LOOP:
        text = (
            f"the guest's instructions are emulated in software (a plain loop takes {slowness:,.0f} times as long as "
            "outside the guest), so this KVM has no hardware virtualization to measure"
        )
        yield Reason(code="emulated-guest", meaningless=True, text=text)
    if below and below != EMULATOR:
        text = (
            f"this machine is itself a guest of {below}: every exit passes through the hypervisor below, so the "
            "figures hold for guests inside this machine and not for its hardware"
        )
        yield Reason(code="nested", meaningless=False, text=text)
    kernel = _widest(figures.kernel for figures in measurement.kinds)
    thread = _widest(figures.thread for figures in measurement.kinds)
    if kernel > NOISY_SPREAD or thread > NOISY_SPREAD_OF_A_THREAD:
        spread = max(kernel, thread)
        text = (
            f"the machine was busy with other things: the same doorbell's median differed by {spread:.0%} from round "
            "to round; measure again when it is quiet"
        )
        yield Reason(code="noisy", meaningless=False, text=text)


def _widest(summaries: Iterable[Summary | None]) -> float:
    return max((summary.spread for summary in summaries if summary is not None), default=0.0)
