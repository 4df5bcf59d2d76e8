"""Text for people: short times, shares of a CPU, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def span(nanoseconds: float) -> str:
    """A short time for people, in three digits: 0 ns, 85.2 ns, 1.24 us, 310 us, 4.50 ms, 1.20 s."""
    value, units = nanoseconds, ["ns", "us", "ms"]
    unit = units.pop(0)
    while value >= 999.5 and units:
        value, unit = value / 1000, units.pop(0)
    if value >= 999.5:
        value, unit = value / 1000, "s"
    digits = 0 if value >= 99.95 or value == 0 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def share(ratio: float) -> str:
    """A share of one CPU for people: 0.40 %, 12 %, -0.05 %."""
    percent = ratio * 100
    return f"{percent:.0f} %" if abs(percent) >= 9.95 or percent == 0 else f"{percent:.2f} %"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, two spaces apart."""
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
