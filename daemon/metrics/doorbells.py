"""The costs of doorbells and what hypercalls are worth, as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from daemon.doorbells.worth import HYPERCALL, DoorbellState


def doorbell_metrics(state: DoorbellState | None) -> Iterator[Metric]:
    """None of them without a file of costs; a share that is not known is not there."""
    if state is None:
        return
    cost = GaugeMetricFamily(
        "hyperbell_doorbell_cost_seconds",
        "Median time of one ring, as hyperbell doorbells measured it: until the guest runs on, its eventfd signalled "
        "in the kernel, or until a thread has read that. Kinds exit and cpuid, for comparison, signal no eventfd: a "
        "port answered by userspace, and an instruction answered by KVM.",
        labels=("kind", "target"),
    )
    for target, costs in state.costs.items():
        for kind, seconds in costs.items():
            cost.add_metric((kind, target), seconds)
    yield cost
    yield GaugeMetricFamily(
        "hyperbell_doorbell_costs_trustworthy",
        "0 when the costs were measured where they mean nothing, or less than they seem to.",
        value=state.trustworthy,
    )
    rates = GaugeMetricFamily(
        "hyperbell_doorbell_rings_per_second",
        "Rings in the last seconds by the kind that they cost; of stock QEMU, hypercalls are a VM's, apportioned.",
        labels=("device", "kind"),
    )
    shares = GaugeMetricFamily(
        "hyperbell_doorbell_cpu_share",
        "Share of one CPU that a device's hypercalls save beside plain doorbells, or its plain rings could save.",
        labels=("device", "what"),
    )
    for device in state.devices:
        for kind, rate in {**device.rates.plain, HYPERCALL: device.rates.hypercall}.items():
            rates.add_metric((device.device, kind), rate)
        for what, value in (("saved", device.worth.saved), ("possible", device.worth.possible)):
            if value is not None:
                shares.add_metric((device.device, what), value)
    yield rates
    yield shares
