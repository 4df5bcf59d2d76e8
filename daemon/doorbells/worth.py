"""What the hypercall doorbell is worth to a device: its rate times the difference of two costs. Nothing but arithmetic.

"What's the hypercall rate? At 10K hypercalls/sec, a 0.4us difference will buy us 0.4%", wrote Avi Kivity in 2009.
Rates are rings a second, costs seconds of a vCPU a ring, so that their product is a share of one CPU. The costs are
those that ``hyperbell doorbells`` measured to an eventfd in the kernel: what a ring takes from the guest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

MMIO: Final = "mmio"  # a store that any value may ring: a queue with a notify address of its own
MMIO_MATCH: Final = "mmio-match"  # a store that rings by its value: one address for several queues
PIO: Final = "pio"
HYPERCALL: Final = "hypercall"
"""The doorbells a hypercall can stand in for, by the names that the measured costs have."""

Queue = TypeVar("Queue")

Costs = Mapping[str, float]
"""Seconds a ring, by kind; a kind that does not work is not there."""


@dataclass(frozen=True, slots=True)
class RingRates:
    """How often a device is rung, in rings a second. ``replaced``: the plain kind its hypercalls stand in for."""

    plain: Mapping[str, float]
    hypercall: float
    replaced: str

    @property
    def total(self) -> float:
        return sum(self.plain.values()) + self.hypercall


@dataclass(frozen=True, slots=True)
class Worth:
    """Shares of one CPU. ``saved``: what the device's hypercalls spare now, negative when they cost more than plain
    rings would; ``possible``: what its plain rings would spare as hypercalls. ``None``: a cost is not known.

    ``plain_cheaper``: a plain doorbell of the device costs less than a hypercall here.
    """

    saved: float | None
    possible: float | None
    plain_cheaper: bool


def worth(rates: RingRates, costs: Costs) -> Worth:
    """The arithmetic, for one device."""
    in_use = [kind for kind, rate in rates.plain.items() if rate > 0] or [rates.replaced]
    cheaper = HYPERCALL in costs and any(kind in costs and costs[kind] < costs[HYPERCALL] for kind in in_use)
    return Worth(_saved(rates, costs), _possible(rates, costs), cheaper)


def _saved(rates: RingRates, costs: Costs) -> float | None:
    if rates.hypercall == 0:
        return 0.0
    if HYPERCALL not in costs or rates.replaced not in costs:
        return None
    return rates.hypercall * (costs[rates.replaced] - costs[HYPERCALL])


def _possible(rates: RingRates, costs: Costs) -> float | None:
    ringing = {kind: rate for kind, rate in rates.plain.items() if rate > 0}
    if not ringing:
        return 0.0
    if HYPERCALL not in costs or not ringing.keys() <= costs.keys():
        return None
    return sum(rate * max(0.0, costs[kind] - costs[HYPERCALL]) for kind, rate in ringing.items())


def apportion(hypercalls: float, kicks: Mapping[Queue, float]) -> dict[Queue, float]:
    """A VM's ``hypercalls`` a second among its queues, in proportion to how often each is kicked.

    KVM counts hypercalls by VM. The kicks of a queue include those by hypercall, so no queue gets more than it has;
    what is left over were calls of another kind.
    """
    total = sum(kicks.values())
    if total <= 0 or hypercalls <= 0:
        return dict.fromkeys(kicks, 0.0)
    share = min(1.0, hypercalls / total)
    return {queue: rate * share for queue, rate in kicks.items()}


@dataclass(frozen=True, slots=True)
class DeviceWorth:
    """One device in the last window: rings a second by kind, and what they come to."""

    device: str
    rates: RingRates
    worth: Worth


@dataclass(frozen=True, slots=True)
class DoorbellState:
    """What is shown: the costs that were measured, by target, what they are good for, and the devices.

    ``window_seconds`` is what the rates are taken over; 0 until the first window has passed.
    """

    costs: Mapping[str, Costs]
    trustworthy: bool
    reasons: tuple[str, ...]
    measured_at: str
    window_seconds: float
    devices: tuple[DeviceWorth, ...]
