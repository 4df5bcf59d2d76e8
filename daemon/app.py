"""The running daemon: one nursery that holds every server, opened after and closed before what they stand on."""

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from config.changes import Change, changes
from config.loader import Config
from config.problems import ConfigError
from config.schema import DaemonConfig
from daemon import log
from daemon.assembly import Assembly, assemble
from daemon.catalogue import Service, make_devices
from daemon.control import serve_control
from daemon.doorbell_meter import DoorbellMeter, open_meter
from daemon.links import Links
from daemon.metrics_server import metrics_url, serve_metrics
from daemon.policies import Policies
from daemon.state import ConnectionState, DaemonState, DeviceState, version
from daemon.systemd import Notifier, feed_watchdog, watchdog_interval
from transports.qemu_doorbells.server import serve as serve_qemu_doorbells
from transports.qemu_doorbells.vms import QemuDoorbells
from transports.vhost_user.endpoint import Listen, SocketFile
from virtio.errors import HostError

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
    """One run of the daemon for ``config``; ``load`` reads the configuration anew for a reload."""

    def __init__(self, config: Config, load: Callable[[], Config], log_choice: LogChoice, notifier: Notifier) -> None:
        self._config = config
        self._load = load
        self._log_choice = log_choice
        self._notifier = notifier
        self._log = structlog.get_logger()
        self._assembly = Assembly({}, {}, {})
        self._services: dict[str, Service] = {}
        self._metrics_url = ""
        self._policies = Policies({name: device.common.hypercall for name, device in config.devices.items()})
        self._doorbells = QemuDoorbells()
        self._meter: DoorbellMeter | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until every device's inherited connection ended.

        Raises ``HostError`` (in groups) when something configured cannot be had.
        """
        with trio.open_signal_receiver(*STOP_SIGNALS, signal.SIGHUP) as signals:
            async with AsyncExitStack() as stack:
                devices = make_devices(self._config.devices)
                assembly = assemble(devices, self._config.devices, self._config.workers)
                self._assembly = await stack.enter_async_context(assembly)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._obey, signals, nursery.cancel_scope)
                    await self._serve(stack, nursery)

    def snapshot(self) -> DaemonState:
        """The counters now. In the event loop only, so that nothing read here is being closed."""
        devices = tuple(
            DeviceState(
                backend=self._assembly.backends[name].stats(),
                connection=ConnectionState.of(service.connection),
                transport=self._config.devices[name].common.transport,
                socket=self._config.devices[name].common.socket,
            )
            for name, service in self._services.items()
        )
        return DaemonState(
            devices,
            self._assembly.worker_stats(),
            vms=self._doorbells.snapshot(),
            policies=self._policies.current,
            refusals=dict(self._doorbells.refusals),
            doorbells=self._meter.state() if self._meter is not None else None,
        )

    # The servers

    async def _serve(self, stack: AsyncExitStack, nursery: trio.Nursery) -> None:
        config = self._config
        for name, backend in self._assembly.backends.items():
            self._services[name] = Service(backend, config.devices[name].common)
            backend.kick_observer = partial(self._doorbells.kick_changed, name)
        self._policies.tell(self._doorbells.set_policy)
        self._meter = open_meter(config.daemon.doorbell_costs)
        if self._meter is not None:
            nursery.start_soon(self._meter.run, self.snapshot)
        if config.daemon.hypercall_socket is not None:
            await nursery.start(self._serve_qemu_doorbells, config.daemon.hypercall_socket)
        if config.daemon.control is not None:
            links = Links(self._assembly.devices)
            await nursery.start(serve_control, config.daemon.control, self.snapshot, self._policies, links)
        if config.daemon.metrics_address is not None:
            host, port = await stack.enter_async_context(serve_metrics(*config.daemon.metrics_address, self.snapshot))
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
        """Start every device's server, say that all are ready, and stop the daemon when none is left."""
        async with trio.open_nursery() as servers:
            for name, service in self._services.items():
                await servers.start(self._serve_device, name, service)
            self._announce()
            if math.isfinite(watchdog_interval()):
                nursery.start_soon(feed_watchdog, self._notifier, watchdog_interval())
        self._log.info("no device is left to serve")
        nursery.cancel_scope.cancel()

    async def _serve_device(
        self, name: str, service: Service, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            await service.run(task_status=task_status)
        except HostError as error:
            raise HostError(f"[devices.{name}] {error}", errno=error.errno) from error

    def _announce(self) -> None:
        self._log.info(
            "serving",
            version=version(),
            pid=os.getpid(),
            devices=list(self._services),
            metrics=self._metrics_url or "off",
        )
        self._notifier.ready(self._status())

    def _status(self) -> str:
        names = ", ".join(self._services)
        return f"serving {names}; metrics at {self._metrics_url}" if self._metrics_url else f"serving {names}"

    # Signals

    async def _obey(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                self._reload()
            else:
                self._log.info("stopping", signal=signal.Signals(number).name)
                self._notifier.stopping()
                scope.cancel()

    def _reload(self) -> None:
        """Put into effect what can be; a configuration with mistakes changes nothing."""
        self._notifier.reloading()
        try:
            new = self._load()
        except ConfigError as error:
            for problem in error.problems:
                self._log.error("not reloaded: the configuration has a mistake", problem=str(problem))
            refusal = "a reload was refused: the configuration has a mistake; "
        except Exception:
            # A mistake of ours, or of a device's file. The guests that are served now must not pay for it.
            self._log.exception("not reloaded")
            refusal = "a reload failed; "
        else:
            refusal = ""
            self._log_choice.apply(new)
            for change in changes(self._config, new):
                self._report(change)
            self._reload_policies(new)
            self._config = replace(self._config, daemon=_with_reloaded_keys(self._config, new))
            self._assembly.refresh_devices()
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
