"""The running daemon: one nursery that holds every server, opened after and closed before what they stand on."""

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from config.changes import Change, changes
from config.loader import Config, Device
from config.problems import ConfigError
from config.schema import DaemonConfig
from daemon.doorbells.policies import Policies
from daemon.log import setup as log
from daemon.metrics.server import metrics_url, serve_metrics
from daemon.running.assembly import Assembly, make_backend, start_workers
from daemon.running.control import serve_control
from daemon.running.descriptors import limit, shares
from daemon.running.disks import Disks
from daemon.running.doorbell_meter import DoorbellMeter, open_meter
from daemon.running.files import FILES_SECONDS, Files, NoAnswerError, no_answer
from daemon.running.links import Links
from daemon.running.served import ServedDevice
from daemon.running.stuck import end_when_stuck
from daemon.running.systemd import Notifier, feed_watchdog, watchdog_interval
from daemon.state import ConnectionState, DaemonState, DeviceState, FailedDevice, version
from transports.stock_qemu.server import serve as serve_qemu_doorbells
from transports.stock_qemu.vms import QemuDoorbells
from virtio.backend.backend import Backend
from virtio.clients import shortages
from virtio.device import START_SECONDS
from virtio.device import Device as VirtioDevice
from virtio.errors import HostError
from virtio.socket_file import Listen, SocketFile

CONFIGURATION: Final = ""  # the owner of its reading: no device has that name
CONFIGURATION_SECONDS: Final = 30.0  # each path in it that hangs takes 2 of them
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
RELOADABLE: Final = frozenset({("daemon", "log_level"), ("daemon", "log_format")})
"""The keys that a reload (SIGHUP) puts into effect, beside every device's ``hypercall``; all others need a restart."""


@dataclass(frozen=True, slots=True)
class LogChoice:
    """What the command line says of the log; ``None`` leaves it to the configuration."""

    level: str | None
    format: str | None

    def apply(self, config: Config) -> None:
        log.configure(self.level or config.daemon.log_level, self.format or config.daemon.log_format)


class App:
    """One run of the daemon for ``config``; ``load`` reads the configuration again, for a reload.

    ``strict``: a device that cannot be had ends the daemon. ``early_signals``: those that came before ``run``.
    """

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        log_choice: LogChoice,
        notifier: Notifier,
        *,
        strict: bool = False,
        early_signals: Collection[int] = (),
    ) -> None:
        self._config = config
        self._load = load
        self._log_choice = log_choice
        self._notifier = notifier
        self._strict = strict
        self._early_signals = early_signals
        self._log = structlog.get_logger()
        self._devices: dict[str, VirtioDevice] = {}  # those that are served now
        self._backends: dict[str, Backend] = {}
        self.files: Final = Files()
        self._assembly = Assembly({}, self._devices, self._backends, self.files)
        names = [*config.devices, *config.unavailable]
        self._served = {name: ServedDevice(name, self, strict=strict) for name in names}
        self._metrics_url = ""
        self._announced = False
        self._shares: tuple[Config, dict[str, int]] | None = None  # of that configuration
        self._stopping = trio.Event()
        self._ending: list[Backend] = []  # what was served when it came
        self._reloading = trio.Lock()
        policies = {
            name: config.devices[name].common.hypercall if name in config.devices else "offer" for name in names
        }
        self._policies = Policies(policies)
        self._doorbells = QemuDoorbells()
        self._meter: DoorbellMeter | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until every device's inherited connection ended.

        Raises ``HostError`` (in groups) when something configured that is no device cannot be had, or a device in
        strict mode.
        """
        with trio.open_signal_receiver(*STOP_SIGNALS, signal.SIGHUP) as signals:
            async with trio.open_nursery() as guard:
                seconds = self._config.daemon.stop_seconds
                guard.start_soon(end_when_stuck, self._stopping, seconds, lambda: self._ending, self.files)
                await self._run(signals)
                guard.cancel_scope.cancel()

    async def _run(self, signals: AsyncIterator[int]) -> None:
        async with trio.open_nursery() as outer:
            outer.start_soon(self._obey, signals, outer)
            async with AsyncExitStack() as stack:
                used = {name for device in self._config.devices.values() for name in device.workers}
                threads = await stack.enter_async_context(start_workers(self._config.workers, used))
                self._assembly = Assembly(threads, self._devices, self._backends, self.files)
                async with trio.open_nursery() as nursery:
                    await self._serve(nursery)
            outer.cancel_scope.cancel()

    def snapshot(self) -> DaemonState:
        """The counters now. In the event loop only, so that nothing read here is being closed."""
        devices = tuple(
            DeviceState(
                backend=self._backends[name].stats(),
                connection=ConnectionState.of(served.connection),
                transport=self._config.devices[name].common.transport,
                socket=self._config.devices[name].common.socket,
            )
            for name, served in self._served.items()
            if name in self._backends
        )
        return DaemonState(
            devices,
            self._assembly.worker_stats(),
            vms=self._doorbells.snapshot(),
            policies=self._policies.current,
            refusals=dict(self._doorbells.refusals),
            doorbells=self._meter.state() if self._meter is not None else None,
            failed=tuple(self._failed()),
            failures={name: served.failures for name, served in self._served.items()},
            log_lines_lost=log.lines_lost(),
            descriptor_shortages=dict(shortages),
        )

    def _failed(self) -> Iterator[FailedDevice]:
        for name, served in self._served.items():
            if served.failure is not None:
                type_name = self._config.devices[name].common.type if name in self._config.devices else ""
                failure = served.failure
                yield FailedDevice(name, type_name, failure.reason, failure.since, failure.next_attempt)

    # What each served device asks of the daemon (``daemon.running.served.Surroundings``)

    async def configured(self, name: str) -> Device:
        """Where its class could not be had, the configuration is read again: its file may work by now."""
        if name not in self._config.devices and self._served[name].failures:
            try:
                new = await self._load_again()
            except ConfigError as error:
                raise HostError(f"the configuration has a mistake by now: {error.problems[0]}") from error
            self._take_table(name, new)
        if name in self._config.unavailable:
            raise HostError(str(self._config.unavailable[name]))
        if name not in self._config.devices:
            raise HostError("it is no longer in the configuration")
        return self._config.devices[name]

    def share_of(self, name: str) -> int:
        if self._shares is None or self._shares[0] is not self._config:
            self._shares = self._config, shares(self._config, limit())
        return self._shares[1][name]

    async def _load_again(self) -> Config:
        """In a thread: it looks at files that it names, and runs those of classes."""
        try:
            return await self.files.run(CONFIGURATION, self._load, seconds=CONFIGURATION_SECONDS)
        except NoAnswerError:
            raise HostError(no_answer(self._config.path, CONFIGURATION_SECONDS)) from None

    def backend_of(self, device: VirtioDevice, configured: Device) -> Backend:
        return make_backend(device, configured, self._assembly.workers)

    def came(self, name: str, device: VirtioDevice, backend: Backend) -> None:
        self._devices[name] = device
        self._backends[name] = backend
        backend.kick_observer = partial(self._doorbells.kick_changed, name)

    def went(self, name: str) -> None:
        del self._devices[name], self._backends[name]

    def changed(self) -> None:
        if self._announced:
            self._notifier.status(self._status())

    def _take_table(self, name: str, new: Config) -> None:
        """Of a device that is not served: its table as the file has it now."""
        devices, unavailable = dict(self._config.devices), dict(self._config.unavailable)
        before = devices.pop(name, None)
        unavailable.pop(name, None)
        if name in new.devices:
            devices[name] = new.devices[name]
            policy = devices[name].common.hypercall
            if before is None or before.common.hypercall != policy:
                self._policies.set(name, policy)
        elif name in new.unavailable:
            unavailable[name] = new.unavailable[name]
        self._config = replace(self._config, devices=devices, unavailable=unavailable)

    # The servers

    async def _serve(self, nursery: trio.Nursery) -> None:
        config = self._config
        self._policies.tell(self._doorbells.set_policy)
        self._meter = open_meter(config.daemon.doorbell_costs)
        if self._meter is not None:
            nursery.start_soon(self._meter.run, self.snapshot)
        if config.daemon.hypercall_socket is not None:
            await nursery.start(self._serve_qemu_doorbells, config.daemon.hypercall_socket)
        if config.daemon.control is not None:
            links = Links(self._assembly.devices)
            disks = Disks(self._assembly.devices, self.files)
            await nursery.start(serve_control, config.daemon.control, self.snapshot, self._policies, links, disks)
        if config.daemon.metrics_address is not None:
            host, port = await nursery.start(serve_metrics, *config.daemon.metrics_address, self.snapshot)
            self._metrics_url = metrics_url(host, port)
        await self._serve_devices(nursery)

    async def _serve_qemu_doorbells(
        self, path: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Where QEMUs with the preload library report. Never connected to by a guest."""
        daemon = self._config.daemon
        mode = int(daemon.hypercall_socket_mode, 8)
        try:
            file = SocketFile(Listen(path, mode, daemon.hypercall_socket_group, socket.SOCK_SEQPACKET))
        except HostError as error:
            raise HostError(f"[daemon] hypercall_socket: {error}", errno=error.errno) from error
        try:
            await serve_qemu_doorbells(file.socket, self._doorbells, task_status)
        finally:
            file.close()

    async def _serve_devices(self, nursery: trio.Nursery) -> None:
        """Serve every device, say when all are served or failed, and stop the daemon when none is left."""
        async with trio.open_nursery() as servers:
            for served in self._served.values():
                servers.start_soon(served.run)
            # A device that asks for longer (start_seconds), or does not let itself be cancelled, comes later.
            with trio.move_on_after(START_SECONDS + 1 + (FILES_SECONDS if self._strict else 0)):
                for served in self._served.values():
                    await served.decided.wait()
            if self._strict and (failed := [*self._failed()]):
                errors = [HostError(f"[devices.{device.device}] {device.reason}") for device in failed]
                raise ExceptionGroup("devices cannot be had", errors)
            self._announce()
            if math.isfinite(watchdog_interval()):
                nursery.start_soon(feed_watchdog, self._notifier, watchdog_interval())
        self._log.info("no device is left to serve")
        nursery.cancel_scope.cancel()

    def _announce(self) -> None:
        failed = [device.device for device in self._failed()]
        self._log.info(
            "serving",
            version=version(),
            pid=os.getpid(),
            devices=self._names(),
            metrics=self._metrics_url or "off",
            **({"failed": failed} if failed else {}),
        )
        self._announced = True
        self._notifier.ready(self._status())

    def _names(self) -> list[str]:
        """The devices that are served, in the order of the configuration."""
        return [name for name in self._served if name in self._backends]

    def _status(self) -> str:
        status = f"serving {', '.join(self._names()) or 'no device'}"
        failed = ", ".join(device.device for device in self._failed())
        if failed:
            status += f"; failed: {failed}"
        return f"{status}; metrics at {self._metrics_url}" if self._metrics_url else status

    # Signals

    async def _obey(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        for number in self._early_signals:
            self._obey_one(number, nursery)
        async for number in signals:
            self._obey_one(number, nursery)

    def _obey_one(self, number: int, nursery: trio.Nursery) -> None:
        if number == signal.SIGHUP:
            nursery.start_soon(self._reload)
        elif not nursery.cancel_scope.cancel_called:
            self._log.info("stopping", signal=signal.Signals(number).name)
            self._notifier.stopping()
            self._ending.extend(self._backends.values())
            self._stopping.set()
            nursery.cancel_scope.cancel()

    async def _reload(self) -> None:
        """Put into effect what can be; a configuration with mistakes changes nothing. One at a time."""
        async with self._reloading:
            await self._reload_now()

    async def _reload_now(self) -> None:
        self._notifier.reloading()
        try:
            new = await self._load_again()
        except ConfigError as error:
            for problem in error.problems:
                self._log.error("not reloaded: the configuration has a mistake", problem=str(problem))
            refusal = "a reload was refused: the configuration has a mistake; "
        except HostError as error:
            self._log.error("not reloaded", reason=str(error))
            refusal = "a reload failed; "
        except Exception:
            # A mistake of ours, or of a device's file. The guests that are served now must not pay for it.
            self._log.exception("not reloaded")
            refusal = "a reload failed; "
        else:
            refusal = ""
            self._log_choice.apply(new)
            for name, served in self._served.items():
                if served.failure is not None:
                    self._take_table(name, new)
            for change in changes(self._config, new):
                self._report(change)
            self._reload_policies(new)
            self._config = replace(self._config, daemon=_with_reloaded_keys(self._config, new))
            await self._assembly.refresh_devices()
            for served in self._served.values():
                served.retry_now()
            self._log.info("reloaded")
        self._notifier.ready(refusal + self._status())

    def _reload_policies(self, new: Config) -> None:
        """What an operator has changed by the control socket stays, unless the file says something new."""
        devices = dict(self._config.devices)
        for name, device in devices.items():
            policy = new.devices[name].common.hypercall if name in new.devices else device.common.hypercall
            if policy != device.common.hypercall:
                self._policies.set(name, policy)
                devices[name] = replace(device, common=device.common.model_copy(update={"hypercall": policy}))
        self._config = replace(self._config, devices=devices)

    def _report(self, change: Change) -> None:
        is_policy = change.table.startswith("devices.") and change.key == "hypercall"
        if is_policy or (change.table, change.key) in RELOADABLE:
            self._log.info("changed", table=change.table, key=change.key, old=change.old, new=change.new)
        elif change.key:
            self._log.warning(
                "needs a restart", table=change.table, key=change.key, running=change.old, configured=change.new
            )
        else:
            what = "was added" if change.old is None else "was removed"
            self._log.warning(f"needs a restart: the table {what}", table=change.table)


def _with_reloaded_keys(old: Config, new: Config) -> DaemonConfig:
    keys = {key for table, key in RELOADABLE if table == "daemon"}
    return old.daemon.model_copy(update={key: getattr(new.daemon, key) for key in keys})
