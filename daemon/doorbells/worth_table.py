"""What hypercalls are worth to the devices, as ``hyperbell show`` prints it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from daemon.text import share, span, table

_COLUMNS: Final = ("DEVICE", "RINGS/S", "BY HYPERCALL", "PLAIN", "SAVES NOW", "COULD SAVE")


def render_worth(doorbells: Mapping[str, Any]) -> str:
    """The table, and what is to be known of its figures. ``doorbells``: a ``DoorbellState`` as JSON has it."""
    doubt = "" if doorbells["trustworthy"] else "?"
    lines = []
    if doorbells["window_seconds"]:
        lines.append(table(_COLUMNS, [_row(device, doubt) for device in doorbells["devices"]]))
    lines += _remarks(doorbells)
    return "\n".join(lines)


def _row(device: Mapping[str, Any], doubt: str) -> Sequence[str]:
    rates, worth = device["rates"], device["worth"]
    plain = ", ".join(f"{rate:,.0f} by {kind}" for kind, rate in rates["plain"].items() if rate >= 0.5)
    return (
        device["device"],
        f"{sum(rates['plain'].values()) + rates['hypercall']:,.0f}",
        f"{rates['hypercall']:,.0f}",
        plain or "-",
        _share(worth["saved"], doubt),
        _share(worth["possible"], doubt),
    )


def _share(value: float | None, doubt: str) -> str:
    return "unknown" if value is None else share(value) + doubt


def _remarks(doorbells: Mapping[str, Any]) -> Iterator[str]:
    costs = ", ".join(f"{kind} {span(cost * 1e9)}" for kind, cost in doorbells["costs"]["kernel"].items())
    if doorbells["window_seconds"]:
        window = doorbells["window_seconds"]
        yield f"Rates are of the last {window:.0f} s, shares of one CPU: rate times the difference of the costs."
    yield f"Costs of a ring, measured {doorbells['measured_at']}: {costs}."
    for reason in doorbells["reasons"]:
        yield f"? {reason}."
    if "hypercall" not in doorbells["costs"]["kernel"]:
        yield "The hypercall did not work where the costs were measured, so what it could save is unknown."
    cheaper = [device["device"] for device in doorbells["devices"] if device["worth"]["plain_cheaper"]]
    if cheaper:
        yield f"A plain doorbell is cheaper here than a hypercall for: {', '.join(cheaper)}."
