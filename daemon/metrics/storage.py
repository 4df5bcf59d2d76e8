"""What the storage of disks answered, as metric families."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from daemon.state import DeviceState


def storage_metrics(devices: Iterable[DeviceState]) -> Iterator[Metric]:
    rows = [(device.backend.device, device.backend.storage) for device in devices if device.backend.storage is not None]
    errors = CounterMetricFamily(
        "hyperbell_storage_errors",
        "Errors of a disk's storage by errno; ENDED: the file ends before the disk does.",
        labels=("device", "op", "errno"),
    )
    failed = GaugeMetricFamily(
        "hyperbell_storage_flush_failed",
        "1 after a flush or write-back failed: every flush fails until the image is opened again.",
        labels=("device",),
    )
    reopened = CounterMetricFamily(
        "hyperbell_storage_reopened",
        "How often a disk's image was opened again: what a flush had lost before is lost.",
        labels=("device",),
    )
    stopped = GaugeMetricFamily(
        "hyperbell_storage_stopped",
        "1 while a disk keeps its requests because its storage failed one (on_error = stop).",
        labels=("device",),
    )
    kept = GaugeMetricFamily(
        "hyperbell_storage_kept_requests",
        "Requests of a stopped disk that wait now.",
        labels=("device",),
    )
    retries = CounterMetricFamily(
        "hyperbell_storage_retries",
        "How often the requests of a stopped disk were tried again.",
        labels=("device",),
    )
    for device, storage in rows:
        stopped.add_metric((device,), storage.stopped is not None)
        kept.add_metric((device,), storage.kept)
        retries.add_metric((device,), storage.retries)
        reopened.add_metric((device,), storage.reopened)
        failed.add_metric((device,), storage.flush_failed is not None)
        for error in storage.errors:
            errors.add_metric((device, error.op, error.errno), error.count)
    yield errors
    yield failed
    yield from (reopened, stopped, kept, retries)
