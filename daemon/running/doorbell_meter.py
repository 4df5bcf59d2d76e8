"""How often devices are rung, over a window of some seconds, and what a hypercall is worth to each at that rate.

It runs only where the costs of doorbells are known. A look at the counters every few seconds is all it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import structlog
import trio

from daemon.doorbells.report import TARGETS, Report, load
from daemon.doorbells.worth import MMIO, MMIO_MATCH, PIO, Costs, DeviceWorth, DoorbellState, RingRates, apportion, worth
from daemon.state import DaemonState, DeviceState
from virtio.errors import HostError
from virtio.waist import Doorbell

WINDOW_SECONDS: Final = 5.0

OWN_TRANSPORT: Final = "kvm"
"""Of devices whose VM is ours: each kind of doorbell has an eventfd of its own, so its rings are counted exactly."""

Key = TypeVar("Key")

_Queue = tuple[str, int]
_Rates = Mapping[_Queue, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class _Counters:
    """All that rates are made of: rings of each queue by kind, and the hypercalls of each VM (by name and process)."""

    at: float
    rings: Mapping[_Queue, Mapping[str, int]]
    hypercalls: Mapping[tuple[str, int], int]

    @classmethod
    def of(cls, at: float, state: DaemonState) -> _Counters:
        rings = {
            (device.backend.device, queue.queue): dict(queue.doorbells)
            for device in state.devices
            for queue in device.backend.queues
        }
        return cls(at, rings, {(vm.name, vm.pid): vm.hypercalls for vm in state.vms})


class DoorbellMeter:
    """Knows the costs from ``report``, is shown the counters now and then, and has the products."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._costs: dict[str, Costs] = {target: report.costs(target) for target in TARGETS}
        self._before: _Counters | None = None
        self._window = 0.0
        self._devices: tuple[DeviceWorth, ...] = ()

    async def run(self, snapshot: Callable[[], DaemonState]) -> None:
        """Look at the counters once a window, until cancelled."""
        while True:
            self.observe(trio.current_time(), snapshot())
            await trio.sleep(WINDOW_SECONDS)

    def observe(self, at: float, state: DaemonState) -> None:
        """The counters at the time ``at``, in seconds; the rates are those since the time before."""
        before, now = self._before, _Counters.of(at, state)
        self._before = now
        if before is None or now.at <= before.at:
            return
        self._window = now.at - before.at
        rates = {queue: _rates(before.rings.get(queue, {}), rings, self._window) for queue, rings in now.rings.items()}
        calls = _rates(before.hypercalls, now.hypercalls, self._window)
        by_call = _hypercalls_of_queues(state, rates, calls)
        self._devices = tuple(self._device_worth(device, state, rates, by_call) for device in state.devices)

    def _device_worth(
        self, device: DeviceState, state: DaemonState, rates: _Rates, by_call: Mapping[_Queue, float]
    ) -> DeviceWorth:
        name = device.backend.device
        queues = [(name, queue.queue) for queue in device.backend.queues]
        totals = {kind.label: sum(rates[queue].get(kind.label, 0.0) for queue in queues) for kind in Doorbell}
        if device.transport == OWN_TRANSPORT:
            found = _rates_of_ours(totals, len(queues))
        else:
            found = _rates_of_stock(totals, sum(by_call.get(queue, 0.0) for queue in queues), _has_port(state, name))
        return DeviceWorth(name, found, worth(found, self._costs["kernel"]))

    def state(self) -> DoorbellState:
        """What metrics and tables show."""
        return DoorbellState(
            costs=self._costs,
            trustworthy=self._report.trustworthy,
            reasons=tuple(reason.text for reason in self._report.reasons),
            measured_at=self._report.measured_at,
            window_seconds=self._window,
            devices=self._devices,
        )


def open_meter(path: Path | None) -> DoorbellMeter | None:
    """A meter with the costs in the file ``path``. A file that cannot be used is one warning, and there is no meter."""
    if path is None:
        return None
    try:
        return DoorbellMeter(load(path))
    except HostError as error:
        structlog.get_logger().warning("[daemon] doorbell_costs cannot be used", reason=str(error))
        return None


def _rates(before: Mapping[Key, int], now: Mapping[Key, int], seconds: float) -> dict[Key, float]:
    """Of what was there before; a counter that went back began anew."""
    return {key: max(0, count - before[key]) / seconds for key, count in now.items() if key in before}


def _hypercalls_of_queues(
    state: DaemonState, rates: _Rates, calls: Mapping[tuple[str, int], float]
) -> dict[_Queue, float]:
    """KVM counts by VM: its hypercalls are those of the queues that have an id, by how often each is kicked."""
    found: dict[_Queue, float] = {}
    for vm in state.vms:
        queues = {(bell.device, bell.queue) for bell in vm.bells if bell.registered}
        kicks = {queue: sum(rates[queue].values()) for queue in queues if queue in rates}
        found |= apportion(calls.get((vm.name, vm.pid), 0.0), kicks)
    return found


def _has_port(state: DaemonState, device: str) -> bool:
    """Whether a VM has reported a PIO doorbell of the device: then its driver rings there and not by MMIO."""
    return any(bell.device == device for vm in state.vms for bell in vm.bells)


def _rates_of_ours(totals: Mapping[str, float], queues: int) -> RingRates:
    """QueueNotify is one address for all queues: with several of them it is the value that rings."""
    mmio = MMIO if queues == 1 else MMIO_MATCH
    plain = {mmio: totals[Doorbell.KICK.label], PIO: totals[Doorbell.PIO.label]}
    return RingRates(plain, totals[Doorbell.HYPERCALL.label], mmio)


def _rates_of_stock(totals: Mapping[str, float], hypercalls: float, has_port: bool) -> RingRates:
    """QEMU's doorbells of a queue all end in its kick fd; its MMIO doorbells ring by any value."""
    kind = PIO if has_port else MMIO
    kicks = sum(totals.values())
    return RingRates({kind: max(0.0, kicks - hypercalls)}, min(kicks, hypercalls), kind)
