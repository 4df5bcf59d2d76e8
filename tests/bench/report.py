"""Tables of the results: text, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.bench.matrix import BACK_ENDS, OURS, BackEnd, Bar, ratio
from tests.bench.measure import Idle, Load, Sample, Timing
from tests.bench.packets import BURST, BURSTS, FRAME_BYTES, POLL_US, QUEUE_SIZE, PacketResult

LEGEND = (
    "Each cell: IOPS · p50/p99 latency in µs · CPU seconds of the server for a million requests. Medians of {rounds} "
    "interleaved runs of {seconds:g} s. Ratios: hyperbell's figure divided by the other's, {others}; "
    "more IOPS and less CPU and p50 are better."
)
PACKET_TITLE = f"packets: {FRAME_BYTES} bytes, {BURSTS * BURST} on their way round, split rings of {QUEUE_SIZE}"
PACKET_LEGEND = (
    f"Driver: testpmd's net_virtio_user, which always polls. hyperbell reflects frames with poll_us = {POLL_US}, "
    "testpmd's net_vhost forwards them in macswap mode and never sleeps: both poll. "
    "Ratio: hyperbell's rate divided by the other's."
)


@dataclass(slots=True)
class Report:
    """Everything one call of the benchmark found out. ``memory``: resident bytes by back end and server."""

    machine: Mapping[str, str]
    timing: Timing
    contenders: list[str] = field(default_factory=list)
    results: dict[BackEnd, dict[Load, dict[str, Sample]]] = field(default_factory=dict)
    memory: dict[BackEnd, dict[str, int]] = field(default_factory=dict)
    idle: dict[str, Idle] = field(default_factory=dict)
    packets: dict[str, PacketResult] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)


def render(report: Report, *, markdown: bool) -> str:
    """The whole report as text or Markdown."""
    others = [name for name in report.contenders if name != OURS]
    lines = [f"{name}: {value}" for name, value in report.machine.items()]
    lines = ["  \n".join(lines) if markdown else "\n".join(lines), ""]
    names = " / ".join(others) or "none was measured"
    timing = report.timing
    if report.results:
        lines += [LEGEND.format(rounds=timing.rounds, seconds=timing.seconds, others=names), ""]
    for back_end, loads in report.results.items():
        lines += [_heading(BACK_ENDS[back_end], markdown=markdown), ""]
        lines += _table(_load_rows(report.contenders, others, loads), markdown=markdown)
        memory = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in report.memory[back_end].items())
        lines += ["", f"Memory after the runs, without the guest's: {memory}.", ""]
    if report.idle:
        lines += [_heading("idle, one front-end connected", markdown=markdown), ""]
        lines += _table(_idle_rows(report.idle), markdown=markdown)
        lines.append("")
    if report.packets:
        runs = f"Medians of {timing.rounds} interleaved runs of {timing.seconds:g} s."
        lines += [_heading(PACKET_TITLE, markdown=markdown), "", f"{PACKET_LEGEND} {runs}", ""]
        lines += [*_table(_packet_rows(report.packets), markdown=markdown), ""]
    for note in report.notes:
        lines += [f"Note: {note}.", ""]
    if report.bars:
        lines += [_heading("bars", markdown=markdown), ""]
        lines += [f"- {bar}" if markdown else str(bar) for bar in report.bars]
    return "\n".join(lines) + "\n"


def render_json(report: Report) -> str:
    """The whole report as JSON."""
    back_ends: dict[str, Any] = {}
    for back_end, loads in report.results.items():
        rows = [
            {**asdict(load), "servers": {name: sample.as_dict() for name, sample in samples.items()}}
            for load, samples in loads.items()
        ]
        back_ends[back_end] = {"loads": rows, "memory_bytes": report.memory[back_end]}
    document = {
        "machine": dict(report.machine),
        "timing": asdict(report.timing),
        "back_ends": back_ends,
        "idle": {name: asdict(idle) for name, idle in report.idle.items()},
        "packets": {name: asdict(result) for name, result in report.packets.items()},
        "notes": report.notes,
        "bars": [{"text": bar.text, "passed": bar.passed} for bar in report.bars],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _heading(text: str, *, markdown: bool) -> str:
    return f"### {text[0].upper()}{text[1:]}" if markdown else f"== {text}"


def _load_rows(
    contenders: Sequence[str], others: Sequence[str], loads: Mapping[Load, Mapping[str, Sample]]
) -> list[list[str]]:
    present = [name for name in contenders if any(name in samples for samples in loads.values())]
    against = [name for name in others if name in present]
    rows = [["load", *present, "IOPS ratio", "CPU ratio", "p50 ratio"]]
    for load, samples in loads.items():
        row = [load.title, *(_cell(samples[name]) for name in present)]
        for figure in ("iops", "cpu_s_per_million", "p50_us"):
            ours = getattr(samples[OURS], figure)
            row.append(" / ".join(f"{ratio(ours, getattr(samples[name], figure)):.2f}" for name in against) or "-")
        rows.append(row)
    return rows


def _idle_rows(idle: Mapping[str, Idle]) -> list[list[str]]:
    rows = [["server", "CPU ms", "wake-ups", "seconds"]]
    for name, seen in idle.items():
        rows.append([name, f"{seen.cpu_seconds * 1000:.3f}", str(seen.wakeups), f"{seen.seconds:g}"])
    return rows


def _packet_rows(results: Mapping[str, PacketResult]) -> list[list[str]]:
    rows = [["server", "packets/s", "ratio", "CPU s a million", "sleeps/s", "CPU ms when nothing is sent"]]
    for name, result in results.items():
        run = result.run
        share = ratio(results[OURS].run.packets_per_second, run.packets_per_second)
        figures = [f"{run.packets_per_second:,.0f}", "-" if name == OURS else f"{share:.2f}"]
        figures += [f"{run.cpu_s_per_million:.3f}", f"{run.sleeps_per_second:.0f}"]
        rows.append([name, *figures, f"{result.idle_cpu_seconds * 1000:.3f} in {result.idle_seconds:g} s"])
    return rows


def _cell(sample: Sample) -> str:
    return f"{_thousands(sample.iops)} · {_us(sample.p50_us)}/{_us(sample.p99_us)} · {sample.cpu_s_per_million:.2f}"


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value < 1e5 else f"{value / 1000:.0f}k"


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(rows: Sequence[Sequence[str]], *, markdown: bool) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if not markdown:
        return ["  ".join(row).rstrip() for row in padded]
    rule = ["-" * width for width in widths]
    return ["| " + " | ".join(row) + " |" for row in (padded[0], rule, *padded[1:])]
