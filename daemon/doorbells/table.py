"""The report of ``hyperbell doorbells`` for people: what to think of the figures, the table, and a picture of bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Final

from daemon.doorbells.report import DOORBELLS, Figure, Kind, Measured, Report, Target
from daemon.text import share, span, table

WIDTH_MIN: Final = 50  # of the columns no terminal can go without
WIDTH_MAX: Final = 120
RATE: Final = 10_000
"""Rings a second for which the table says what they take of a CPU: the example of 2009."""

TITLES: Final[dict[Kind, str]] = {
    "mmio": "MMIO, any value",
    "mmio-match": "MMIO, by value",
    "pio": "PIO, by value",
    "hypercall": "hypercall",
    "exit": "exit to userspace",
    "cpuid": "exit for cpuid",
}
_LEGEND: Final = (
    "The left columns are rings of an eventfd in the kernel for which nobody waits: the time a ring takes from the "
    f"guest. AT {RATE // 1000}k/s is that time as a share of one CPU, at {RATE:,} rings a second. The columns on the "
    "right last until a thread that slept has acknowledged. The exits ring nothing; they are there to compare with."
)
_BOLD: Final = "\x1b[1m"
_PLAIN: Final = "\x1b[0m"


def render(report: Report, width: int = 80, *, bold: bool = False) -> str:
    """The whole of it for a terminal of ``width`` columns. ``bold``: the terminal knows escapes for warnings."""
    width = min(max(width, WIDTH_MIN), WIDTH_MAX)
    parts = [_paragraph(_heading(report), width)]
    parts += [_emphasized(_paragraph(text, width), bold) for text in _warnings(report)]
    if report.measured_something:
        parts.append(f"{_table(report, width)}\n\n{_paragraph(_LEGEND, width)}")
    parts += ["\n".join(_paragraph(line, width) for line in _refusals(report))]
    parts += [_bars(report, "kernel", "To the eventfd in the kernel, median:", width)]
    parts += [_bars(report, "thread", "To a waiting thread that acknowledges, median:", width)]
    parts += [_paragraph(text, width) for text in _verdict(report)]
    return "\n\n".join(part for part in parts if part)


def _heading(report: Report) -> str:
    host = report.host
    below = f", itself a guest of {host.below}" if host.below else ""
    placement = f"; {host.placement}" if report.measured_something else ""
    return f"Doorbells on {host.processor}, Linux {host.kernel}{below}{placement}."


def _warnings(report: Report) -> Iterator[str]:
    for reason in report.reasons:
        if report.meaningless and not reason.meaningless:
            continue  # what means nothing needs no care
        title = "THESE FIGURES MEAN NOTHING" if reason.meaningless else "TAKE THESE FIGURES WITH CARE"
        yield f"{title}: {reason.text}."


_COLUMNS: Final = ("", "MEDIAN", "P99", "CYCLES", f"AT {RATE // 1000}k/s", "TO A THREAD", "P99")
_DISPENSABLE: Final = (6, 2, 3)
"""Columns that a narrow terminal goes without, the first one first."""


def _table(report: Report, width: int) -> str:
    rows = [_row(measured) for measured in report.doorbells if measured.why_not is None]
    for dropped in range(len(_DISPENSABLE) + 1):
        kept = [index for index in range(len(_COLUMNS)) if index not in _DISPENSABLE[:dropped]]
        text = table([_COLUMNS[index] for index in kept], [[row[index] for index in kept] for row in rows])
        if max(map(len, text.splitlines())) <= width:
            break
    return text


def _row(measured: Measured) -> Sequence[str]:
    kernel, thread = measured.kernel, measured.thread
    assert kernel is not None
    return (
        TITLES[measured.kind],
        span(kernel.median_ns),
        span(kernel.p99_ns),
        f"{kernel.median_cycles:,}",
        share(RATE * kernel.median_ns / 1e9),
        span(thread.median_ns) if thread else "-",
        span(thread.p99_ns) if thread else "-",
    )


def _refusals(report: Report) -> Iterator[str]:
    """One line a reason, with all the kinds that it concerns."""
    concerned: dict[str, list[str]] = {}
    for measured in report.doorbells:
        if measured.why_not is not None:
            concerned.setdefault(measured.why_not, []).append(TITLES[measured.kind])
    for reason, titles in concerned.items():
        subject = "No doorbell works here" if len(titles) == len(report.doorbells) else _list(titles)
        yield f"{subject}: {reason}."


def _list(titles: Sequence[str]) -> str:
    return f"{titles[0]} does not work here" if len(titles) == 1 else f"{'; '.join(titles)} do not work here"


def _bars(report: Report, target: Target, title: str, width: int) -> str:
    rows = [(measured.kind, figure) for measured in report.doorbells if (figure := measured.figure(target)) is not None]
    return "\n".join([title, *bars([(TITLES[kind], figure.median_ns) for kind, figure in rows], width)]) if rows else ""


def bars(rows: Sequence[tuple[str, float]], width: int) -> Iterator[str]:
    """One line a row: its name, a bar as long as its value is beside the longest, and the value, a span of time."""
    names = max(len(name) for name, _ in rows)
    values = max(len(span(value)) for _, value in rows)
    room = max(1, width - names - values - 4)
    longest = max(value for _, value in rows)
    for name, value in rows:
        length = max(1, round(room * value / longest)) if longest > 0 else 1
        yield f"  {name.ljust(names)} {'#' * length} {span(value)}"


def _verdict(report: Report) -> Iterator[str]:
    """The question of 2009, answered for this host."""
    call = _kernel_figure(report, "hypercall")
    plain = {kind: figure for kind in DOORBELLS[:-1] if (figure := _kernel_figure(report, kind)) is not None}
    if call is None or not plain:
        return
    sentences = []
    for kind, figure in plain.items():
        gain = figure.median_ns - call.median_ns
        what = "saves" if gain >= 0 else "costs"
        sentences.append(
            f"beside {TITLES[kind]} it {what} {span(abs(gain))}{'' if gain >= 0 else ' more'}, "
            f"{share(RATE * abs(gain) / 1e9)} of a CPU"
        )
    said = " So the figures say; they mean nothing." if report.meaningless else ""
    yield f"At {RATE:,} rings a second the hypercall, " + "; ".join(sentences) + f".{said}"


def _kernel_figure(report: Report, kind: Kind) -> Figure | None:
    measured = report.find(kind)
    return measured.kernel if measured is not None else None


def _paragraph(text: str, width: int) -> str:
    return "\n".join(wrap(text, width, break_long_words=False, break_on_hyphens=False))


def _emphasized(text: str, bold: bool) -> str:
    return f"{_BOLD}{text}{_PLAIN}" if bold else text
