"""One configured device and its life: it is opened, served, and after each failure tried again later.

A device that cannot be had (its image is missing, its tap is gone, its Python file fails) keeps no other device from
its guest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import structlog
import trio

from config.loader import Device as Configured
from config.schema import DeviceConfig
from daemon.devices.catalogue import endpoint_of, transport_of
from daemon.running.failures import leaves
from daemon.running.files import Files
from daemon.running.opening import open_device
from transports.vhost_user.serving.stats import ConnectionStats
from virtio.backend.backend import Backend
from virtio.backend.device_calls import DEVICE, DeviceCalls, one_line
from virtio.device import Device
from virtio.errors import HostError
from virtio.native.stats import Storage

RETRY_SECONDS_MIN: Final = 1.0  # after the first failure; doubled after each further one ...
RETRY_SECONDS_MAX: Final = 60.0  # ... up to this


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a device is not served. ``since``, ``next_attempt``: wall clock seconds; ``None``: only a restart helps."""

    reason: str
    since: float
    next_attempt: float | None


class Surroundings(Protocol):
    """What the daemon does for its devices."""

    @property
    def files(self) -> Files:
        """The threads that work with files."""

    async def configured(self, name: str) -> Configured:
        """The device's table as it is to be used now. ``HostError``: its class cannot be had."""

    def share_of(self, name: str) -> int:
        """How many descriptors the device may have of its own."""

    def backend_of(self, device: Device, configured: Configured) -> Backend:
        """The back end around an opened device. ``HostError``: something it needs is not there."""

    def came(self, name: str, device: Device, backend: Backend) -> None:
        """The device is being served from now on."""

    def went(self, name: str) -> None:
        """The device is not served any more."""

    def changed(self) -> None:
        """A device failed, or is served again."""


class ServedDevice:
    """``run`` serves the device ``name`` until its front-end leaves for good (``socket_fd``), or until cancelled.

    ``strict``: a failure is not tried again; one after the start is raised as ``HostError``.
    """

    def __init__(self, name: str, around: Surroundings, *, strict: bool) -> None:
        self.name: Final = name
        self.connection: Final = ConnectionStats()
        self.failure: Failure | None = None
        self.failures = 0  # how often it failed since the daemon began
        self.decided: Final = trio.Event()  # it is served, or has failed: the daemon is ready without it
        self._around = around
        self._strict = strict
        self._delay = RETRY_SECONDS_MIN
        self._retry = trio.Event()
        self._storage: Storage | None = None  # of the device that failed
        self._inherited = False  # a socket was inherited and has been used
        self._log = structlog.get_logger().bind(device=name)

    def retry_now(self) -> None:
        """What it needs may be there by now: do not wait any longer."""
        self._retry.set()

    async def run(self) -> None:
        DEVICE.set(self.name)
        while True:
            self._retry = trio.Event()
            try:
                await self._serve()
            except* HostError as group:
                self._fail(str(next(leaves(group))))
            except* Exception as group:
                # A mistake of ours or of the device's: the guests of other devices must not pay for it.
                self._log.error("device failed by a mistake", exc_info=group)
                self._fail(one_line(group.exceptions[0]))
            if self.failure is None:
                self._log.info("the front-end of an inherited connection left; the device is not served any more")
                return
            if self.failure.next_attempt is None:
                return
            with trio.move_on_after(self._delay):
                await self._retry.wait()
            self._delay = min(2 * self._delay, RETRY_SECONDS_MAX)

    async def _serve(self) -> None:
        """One attempt; returns when the front-end of an inherited connection left. Raises ``HostError`` (in groups)."""
        configured = await self._around.configured(self.name)
        device = await open_device(self._around.files, self.name, configured)
        disk = device.disk
        if disk is not None and self._storage is not None:  # a flush that failed is not forgotten with the device
            disk.inherit_storage(self._storage)
        try:
            share = self._around.share_of(self.name)
            DeviceCalls(device).ask("limit_descriptors", lambda: device.limit_descriptors(share))
            async with self._around.backend_of(device, configured) as backend:
                self._around.came(self.name, device, backend)
                try:
                    await self._serve_front_ends(backend, configured.common)
                finally:
                    self._around.went(self.name)
        finally:
            self._storage = DeviceCalls(device).look("storage", disk.storage, None) if disk is not None else None
            await self._around.files.close(device)

    async def _serve_front_ends(self, backend: Backend, common: DeviceConfig) -> None:
        self._inherited = common.socket_fd is not None
        serve = partial(
            transport_of(common).serve,
            stats=self.connection,
            inband_notifications=common.inband_notifications,
            offers_config=common.offer_config,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, backend, endpoint_of(common))
            self._started()

    def _started(self) -> None:
        if self.failure is not None:
            self._log.info("device is served again", failed_attempts=self.failures)
        self.failure = None
        self._delay = RETRY_SECONDS_MIN
        self.decided.set()
        self._around.changed()

    def _fail(self, reason: str) -> None:
        """Note the failure. In strict mode one that comes after the start is raised."""
        if self._strict and self.decided.is_set():
            raise HostError(f"[devices.{self.name}] {reason}")
        self.failures += 1
        before = self.failure
        now = time.time()
        # An inherited socket was closed with the endpoint: its number may be anybody's by now.
        again = None if self._strict or self._inherited else now + self._delay
        self.failure = Failure(reason, before.since if before is not None else now, again)
        if before is None or before.reason != reason:
            self._log.error("device failed", reason=reason, retry_seconds=None if again is None else self._delay)
        self.decided.set()
        self._around.changed()
