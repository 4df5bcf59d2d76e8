"""Counters as Prometheus metrics. Labels have only names from the configuration, from the specification, or numbers."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from daemon.metrics.doorbells import doorbell_metrics
from daemon.metrics.storage import storage_metrics
from daemon.state import ConnectionState, DaemonState, DeviceState, version
from virtio.native.stats import DURATION_BOUNDS, OpStats, QueueStats, WorkerStats

OpCount = Callable[[OpStats], float]
QueueCount = Callable[[QueueStats], float]
ConnectionCount = Callable[[ConnectionState], float]
WorkerCount = Callable[[WorkerStats], float]

OP_COUNTERS: Final[tuple[tuple[str, str, OpCount], ...]] = (
    ("hyperbell_requests", "Requests answered, with success or without.", lambda op: op.requests),
    ("hyperbell_request_bytes", "Data bytes moved by requests.", lambda op: op.bytes),
    ("hyperbell_request_errors", "Requests answered with an error status.", lambda op: op.errors),
)
QUEUE_COUNTERS: Final[tuple[tuple[str, str, QueueCount], ...]] = (
    ("hyperbell_kicks", "Times the driver rang the queue.", lambda queue: queue.kicks),
    ("hyperbell_wakeups", "Times the queue was looked at.", lambda queue: queue.wakeups),
    ("hyperbell_empty_wakeups", "Looks at the queue that found nothing.", lambda queue: queue.empty_wakeups),
    ("hyperbell_notifications_sent", "Interrupts asked for.", lambda queue: queue.notifications_sent),
    (
        "hyperbell_notifications_suppressed",
        "Batches of completions the driver wanted no interrupt for.",
        lambda queue: queue.notifications_suppressed,
    ),
    (
        "hyperbell_notifications_lost",
        "Interrupts asked for where nobody was at the other end of the call fd any more.",
        lambda queue: queue.notifications_lost,
    ),
)
QUEUE_GAUGES: Final[tuple[tuple[str, str, QueueCount], ...]] = (
    ("hyperbell_inflight_requests", "Requests begun and not answered yet.", lambda queue: queue.inflight),
    (
        "hyperbell_oldest_request_age_seconds",
        "Age of the oldest request in flight; 0 without one.",
        lambda queue: queue.oldest_age_seconds,
    ),
    (
        "hyperbell_queue_broken",
        "1 when the queue broke, by its driver or its device; out of use until the driver resets the device.",
        lambda queue: queue.broken,
    ),
)
CONNECTION_COUNTERS: Final[tuple[tuple[str, str, ConnectionCount], ...]] = (
    ("hyperbell_frontend_connections", "Front-ends that were served.", lambda counts: counts.connections),
    ("hyperbell_frontend_reconnects", "Front-ends served after the first.", lambda counts: counts.reconnects),
    (
        "hyperbell_frontend_refused",
        "Front-ends turned away because another was connected.",
        lambda counts: counts.refused,
    ),
    ("hyperbell_frontend_messages", "Protocol messages received.", lambda counts: counts.messages),
)
CONNECTION_GAUGES: Final[tuple[tuple[str, str, ConnectionCount], ...]] = (
    ("hyperbell_frontend_connected", "1 while a front-end is connected.", lambda counts: counts.connected),
    ("hyperbell_memory_regions", "Regions of guest memory in use.", lambda counts: counts.memory_regions),
)
WORKER_COUNTERS: Final[tuple[tuple[str, str, WorkerCount], ...]] = (
    ("hyperbell_worker_wakeups", "Times the thread woke from sleep.", lambda worker: worker.wakeups),
    ("hyperbell_worker_poll_hits", "Polls before sleep that found work.", lambda worker: worker.poll_hits),
    ("hyperbell_worker_poll_misses", "Polls before sleep that found none.", lambda worker: worker.poll_misses),
    ("hyperbell_worker_cpu_seconds", "CPU time the thread used.", lambda worker: worker.cpu_seconds),
)


class StateCollector(Collector):
    """Turns the snapshot that ``snapshot`` takes at every scrape into metric families."""

    def __init__(self, snapshot: Callable[[], DaemonState]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        state = self._snapshot()
        yield from _op_metrics(state.devices)
        yield from _queue_metrics(state.devices)
        yield from _network_metrics(state.devices)
        yield from storage_metrics(state.devices)
        yield from _connection_metrics(state.devices)
        yield from _worker_metrics(state.workers)
        yield from _hypercall_metrics(state)
        yield from doorbell_metrics(state.doorbells)
        yield from _stray_metrics(state)
        yield GaugeMetricFamily("hyperbell_devices", "Devices that are served.", value=len(state.devices))
        yield from _failure_metrics(state)
        yield _log_metric(state)
        yield _shortage_metric(state)
        build = GaugeMetricFamily(
            "hyperbell_build_info", "What runs here; always 1.", labels=("version", "python", "machine")
        )
        build.add_metric((version(), platform.python_version(), platform.machine()), 1)
        yield build


def _failure_metrics(state: DaemonState) -> Iterator[Metric]:
    names = {device.device for device in state.failed}
    failed = GaugeMetricFamily(
        "hyperbell_device_failed", "1 while the device cannot be had and is not served.", labels=("device",)
    )
    failures = CounterMetricFamily(
        "hyperbell_device_failures", "Attempts to serve the device that failed.", labels=("device",)
    )
    for device, count in state.failures.items():
        failed.add_metric((device,), device in names)
        failures.add_metric((device,), count)
    yield failed
    yield failures


def _log_metric(state: DaemonState) -> Metric:
    lost = CounterMetricFamily(
        "hyperbell_log_lines_lost", "Lines of the log that were not written.", labels=("reason",)
    )
    for reason, count in state.log_lines_lost.items():
        lost.add_metric((reason,), count)
    return lost


def _shortage_metric(state: DaemonState) -> Metric:
    text = "Times that there was no file descriptor for somebody, who had to wait."
    shortages = CounterMetricFamily("hyperbell_descriptor_shortages", text, labels=("for",))
    for who, count in state.descriptor_shortages.items():
        shortages.add_metric((who,), count)
    return shortages


def _op_metrics(devices: Iterable[DeviceState]) -> Iterator[Metric]:
    labels = ("device", "queue", "op")
    rows = [
        ((device.backend.device, str(queue.queue), name), op)
        for device in devices
        for queue in device.backend.queues
        for name, op in queue.ops.items()
    ]
    for name, text, count in OP_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=labels)
        for values, op in rows:
            counter.add_metric(values, count(op))
        yield counter
    duration = HistogramMetricFamily(
        "hyperbell_request_duration_seconds", "Time from taking a request to answering it.", labels=labels
    )
    for values, op in rows:
        duration.add_metric(values, _cumulative(op.duration_buckets), op.duration_sum_seconds)
    yield duration


def _cumulative(buckets: tuple[int, ...]) -> list[tuple[str, int]]:
    """Prometheus counts what is *at most* a bound, and its last bucket is +Inf."""
    return list(zip((*map(repr, DURATION_BOUNDS), "+Inf"), accumulate(buckets), strict=True))


def _network_metrics(devices: Iterable[DeviceState]) -> Iterator[Metric]:
    """What moved is in the requests: of an interface, each is a frame, and its operation the direction."""
    backends = [device.backend for device in devices]
    lost = CounterMetricFamily(
        "hyperbell_frames_lost",
        "Frames that were lost on their way from (transmit) or to (receive) the guest.",
        labels=("device", "direction", "reason"),
    )
    up = GaugeMetricFamily("hyperbell_link_up", "1 while the interface's cable is plugged in.", labels=("device",))
    for backend in backends:
        for loss in backend.lost:
            lost.add_metric((backend.device, loss.direction, loss.reason), loss.frames)
        if backend.link_up is not None:
            up.add_metric((backend.device,), backend.link_up)
    yield lost
    yield up


def _queue_metrics(devices: Iterable[DeviceState]) -> Iterator[Metric]:
    labels = ("device", "queue")
    rows = [((device.backend.device, str(queue.queue)), queue) for device in devices for queue in device.backend.queues]
    for name, text, count in QUEUE_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=labels)
        for values, queue in rows:
            counter.add_metric(values, count(queue))
        yield counter
    doorbells = CounterMetricFamily(
        "hyperbell_doorbells",
        "Times the driver rang, by the kind of doorbell: kick is the plain one.",
        labels=(*labels, "kind"),
    )
    for values, queue in rows:
        for kind, rings in queue.doorbells.items():
            doorbells.add_metric((*values, kind), rings)
    yield doorbells
    yield _guest_durations(rows)
    for name, text, count in QUEUE_GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=labels)
        for values, queue in rows:
            gauge.add_metric(values, count(queue))
        yield gauge


def _guest_durations(rows: Iterable[tuple[tuple[str, str], QueueStats]]) -> Metric:
    """Not of a queue that has none: buffers to be filled (a network interface's receive queues) are no requests."""
    guest = HistogramMetricFamily(
        "hyperbell_guest_request_duration_seconds",
        "Time from when a request was available, as far as the device can know, to answering it.",
        labels=("device", "queue"),
    )
    for values, queue in rows:
        if any(queue.guest_duration_buckets):
            guest.add_metric(values, _cumulative(queue.guest_duration_buckets), queue.guest_duration_sum_seconds)
    return guest


def _connection_metrics(devices: Iterable[DeviceState]) -> Iterator[Metric]:
    rows = [(device.backend.device, device.connection) for device in devices if device.connection is not None]
    for name, text, count in CONNECTION_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=("device",))
        for device, connection in rows:
            counter.add_metric((device,), count(connection))
        yield counter
    for name, text, count in CONNECTION_GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=("device",))
        for device, connection in rows:
            gauge.add_metric((device,), count(connection))
        yield gauge
    errors = CounterMetricFamily(
        "hyperbell_protocol_errors",
        "Connections ended because of a message that broke the protocol.",
        labels=("device", "request"),
    )
    for device, connection in rows:
        for request, number in connection.protocol_errors.items():
            errors.add_metric((device, request), number)
    yield errors


def _worker_metrics(workers: Iterable[WorkerStats]) -> Iterator[Metric]:
    rows = tuple(workers)
    for name, text, count in WORKER_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=("worker",))
        for worker in rows:
            counter.add_metric((worker.name,), count(worker))
        yield counter
    info = GaugeMetricFamily(
        "hyperbell_worker_info", "How the thread waits for work; always 1.", labels=("worker", "reactor", "reason")
    )
    for worker in rows:
        info.add_metric((worker.name, worker.reactor, worker.reason), 1)
    yield info


def _hypercall_metrics(state: DaemonState) -> Iterator[Metric]:
    registered = {(bell.device, bell.queue) for vm in state.vms for bell in vm.bells if bell.registered}
    own = [(device.backend.device, bell) for device in state.devices if device.own for bell in device.own.bells]
    registered |= {(device, bell.queue) for device, bell in own if bell.registered}
    gauge = GaugeMetricFamily(
        "hyperbell_hypercall_doorbells",
        "1 while a guest can ring the queue by hypercall: its connection id is in KVM.",
        labels=("device", "queue"),
    )
    for device in state.devices:
        for queue in device.backend.queues:
            key = (device.backend.device, queue.queue)
            gauge.add_metric((key[0], str(key[1])), key in registered)
    yield gauge
    accepted = GaugeMetricFamily(
        "hyperbell_hypercall_doorbells_accepted",
        "1 where the driver in a machine of our own said that it may ring the queue by hypercall.",
        labels=("device", "queue"),
    )
    for name, bell in own:
        accepted.add_metric((name, str(bell.queue)), bell.accepted)
    yield accepted
    hypercalls = CounterMetricFamily(
        "hyperbell_vm_hypercalls", "Hypercalls of all kinds, as KVM counts them.", labels=("vm",)
    )
    for vm in state.vms:
        hypercalls.add_metric((vm.name,), vm.hypercalls)
    yield hypercalls
    refusals = CounterMetricFamily(
        "hyperbell_hypercall_refusals",
        "Times the hypercall doorbell was not to be had: KVM's error, or what the VM lacks.",
        labels=("reason",),
    )
    for reason, count in state.refusals.items():
        refusals.add_metric((reason,), count)
    yield refusals


def _stray_metrics(state: DaemonState) -> Iterator[Metric]:
    """What a guest of a machine of our own rings or touches where there is nothing."""
    strays = CounterMetricFamily(
        "hyperbell_stray_doorbells",
        "Doorbells of queues that do not exist, rung in a machine of our own.",
        labels=("device",),
    )
    for device in state.devices:
        if device.own is not None:
            strays.add_metric((device.backend.device,), device.own.stray_doorbells)
    yield strays
    refused = CounterMetricFamily(
        "hyperbell_machine_refused_hypercalls",
        "Hypercalls with unknown connection ids in a machine of our own, as far as KVM passes them on.",
        labels=(),
    )
    unknown = CounterMetricFamily(
        "hyperbell_machine_unknown_accesses",
        "Accesses to where a machine of our own has nothing. A kernel that looks for devices makes some.",
        labels=("space",),
    )
    if state.machine is not None:
        refused.add_metric((), state.machine.refused_hypercalls)
        unknown.add_metric(("memory",), state.machine.unknown_memory)
        unknown.add_metric(("ports",), state.machine.unknown_ports)
    yield refused
    yield unknown
