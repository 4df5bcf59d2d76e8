"""What every way of serving devices stands on: worker threads, the devices opened, and a back end for each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
import trio

from config.schema import DeviceConfig, WorkerConfig
from daemon.devices.catalogue import Configured, features_left_out, features_off
from daemon.running.files import Files, NoAnswerError, path_of
from virtio.backend.backend import Backend
from virtio.backend.device_calls import MISTAKES
from virtio.device import Device
from virtio.errors import HostError
from virtio.native.stats import WorkerStats
from virtio.native.worker import Worker


@dataclass(frozen=True, slots=True)
class Assembly:
    """All of it by name, for as long as ``assemble`` is entered."""

    workers: Mapping[str, Worker]
    devices: Mapping[str, Device]
    backends: Mapping[str, Backend]
    files: Files

    def worker_stats(self) -> tuple[WorkerStats, ...]:
        return tuple(worker.stats() for worker in self.workers.values())

    async def refresh_devices(self) -> None:
        """Look again at what the devices stand on, and tell the drivers of what changed.

        One that hangs delays nothing but the end of this, and that for the limit of ``files`` at most.
        """
        async with trio.open_nursery() as nursery:
            for name, device in [*self.devices.items()]:
                nursery.start_soon(self._refresh, name, device)

    async def _refresh(self, name: str, device: Device) -> None:
        log = structlog.get_logger()
        try:
            await self.files.run(name, device.examine)
            if self.devices.get(name) is device and device.refresh():
                log.info("changed underneath: the driver is told", device=name)
        except NoAnswerError:
            log.error(
                "not examined: its storage has not answered",
                device=name,
                path=str(path_of(device.options)),
                seconds=self.files.seconds,
            )
        except HostError as error:
            log.error("cannot be examined anew", device=name, error=str(error))
        except MISTAKES as error:
            log.error("device failed", device=name, where="refresh", exc_info=error)


def named(devices: Mapping[str, Device], name: str) -> Device:
    """The device of that name which is served now. ``HostError``: there is none."""
    device = devices.get(name)
    if device is None:
        raise HostError(f"no device {name!r} is served; there are: {', '.join(devices)}")
    return device


@asynccontextmanager
async def assemble(
    devices: Mapping[str, Device],
    configured: Mapping[str, Configured],
    workers: Mapping[str, WorkerConfig],
    files: Files,
) -> AsyncIterator[Assembly]:
    """Start the workers and put a back end around each of ``devices``, which are closed at the end, last of all.

    ``configured`` says of each device by name who drives it and what of it is turned off; ``files`` has opened them.
    Raises ``HostError``.
    """
    async with AsyncExitStack() as stack:
        for device in devices.values():
            stack.push_async_callback(files.close, device)
        used = {name for each in configured.values() for name in each.workers}
        threads = await stack.enter_async_context(start_workers(workers, used))
        backends: dict[str, Backend] = {}
        for name, device in devices.items():
            backends[name] = await stack.enter_async_context(make_backend(device, configured[name], threads))
        yield Assembly(threads, devices, backends, files)


@asynccontextmanager
async def start_workers(workers: Mapping[str, WorkerConfig], used: Container[str]) -> AsyncIterator[dict[str, Worker]]:
    """The threads of those ``workers`` that devices use, until the end. Raises ``HostError``."""
    async with AsyncExitStack() as stack:
        log = structlog.get_logger()
        threads: dict[str, Worker] = {}
        for name, settings in workers.items():
            if name not in used:
                log.warning("no device uses this worker: it is not started", worker=name)
                continue
            worker = Worker(name, settings.cpus or (), settings.poll_us, settings.reactor)
            threads[name] = await stack.enter_async_context(worker)
            values = {"worker": name, "reactor": worker.reactor, "reason": worker.reason}
            if worker.reason.startswith("no io_uring"):
                log.warning("worker runs without io_uring: its disks are slower", **values)
            else:
                log.info("worker runs", **values)
        yield threads


def make_backend(device: Device, configured: Configured, threads: Mapping[str, Worker]) -> Backend:
    """The back end of ``device``, to be entered. ``HostError``: one of its workers was not started."""
    for name in configured.workers:
        if name not in threads:
            raise HostError(f'its worker "{name}" was not started with the daemon; restart the daemon')
    without = features_left_out(configured)
    if without:
        log = structlog.get_logger()
        log.info("not offered: requires what is turned off", device=device.name, features=sorted(without))
    return Backend(
        device,
        workers=[threads[name] for name in configured.workers],
        queue_size_max=configured.common.queue_size,
        features_off=features_off(configured),
        remote_memory=isinstance(configured.common, DeviceConfig) and configured.common.remote_memory,
    )
