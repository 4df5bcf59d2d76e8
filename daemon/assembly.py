"""What every way of serving devices stands on: worker threads, the devices opened, and a back end for each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog

from config.schema import WorkerConfig
from daemon.catalogue import Configured, features_left_out, features_off
from virtio.backend import Backend
from virtio.device import Device
from virtio.device_calls import MISTAKES, close_all
from virtio.errors import HostError
from virtio.stats import WorkerStats
from virtio.worker import Worker


@dataclass(frozen=True, slots=True)
class Assembly:
    """All of it by name, for as long as ``assemble`` is entered."""

    workers: Mapping[str, Worker]
    devices: Mapping[str, Device]
    backends: Mapping[str, Backend]

    def worker_stats(self) -> tuple[WorkerStats, ...]:
        return tuple(worker.stats() for worker in self.workers.values())

    def refresh_devices(self) -> None:
        """Look again at what the devices stand on, and tell the drivers of what changed."""
        log = structlog.get_logger()
        for name, device in self.devices.items():
            try:
                if device.refresh():
                    log.info("changed underneath: the driver is told", device=name)
            except HostError as error:
                log.error("cannot be examined anew", device=name, error=str(error))
            except MISTAKES as error:
                log.error("device failed", device=name, where="refresh", exc_info=error)


@asynccontextmanager
async def assemble(
    devices: Mapping[str, Device], configured: Mapping[str, Configured], workers: Mapping[str, WorkerConfig]
) -> AsyncIterator[Assembly]:
    """Start the workers and put a back end around each of ``devices``, which are closed at the end, last of all.

    ``configured`` says of each device by name who drives it and what of it is turned off. Raises ``HostError``.
    """
    async with AsyncExitStack() as stack:
        stack.callback(close_all, devices.values())
        threads: dict[str, Worker] = {}
        for name, settings in workers.items():
            if not any(name in device.workers for device in configured.values()):
                structlog.get_logger().warning("no device uses this worker: it is not started", worker=name)
                continue
            worker = Worker(name, settings.cpus or (), settings.poll_us, settings.reactor)
            threads[name] = await stack.enter_async_context(worker)
        backends: dict[str, Backend] = {}
        for name, device in devices.items():
            without = features_left_out(configured[name])
            if without:
                log = structlog.get_logger()
                log.info("not offered: requires what is turned off", device=name, features=sorted(without))
            backend = Backend(
                device,
                workers=[threads[worker_name] for worker_name in configured[name].workers],
                queue_size_max=configured[name].common.queue_size,
                features_off=features_off(configured[name]),
            )
            backends[name] = await stack.enter_async_context(backend)
        yield Assembly(threads, devices, backends)
