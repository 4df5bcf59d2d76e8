"""What an operator does about a disk whose storage failed, while the daemon runs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

import structlog
import trio

from virtio.backend.device_calls import DeviceCalls
from virtio.capabilities import DiskStorage
from virtio.device import Device
from virtio.errors import HostError, HyperbellError

COMMANDS: Final = ("reopen", "retry")
REOPEN_SECONDS: Final = 10.0  # how long the storage may take


class Disks:
    """The disks among ``devices``, by name. ``limiters``: by device, so that storage that hangs keeps one thread."""

    def __init__(self, devices: Mapping[str, Device], limiters: MutableMapping[str, trio.CapacityLimiter]) -> None:
        self._devices = devices
        self._limiters = limiters

    async def answer(self, command: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one of ``COMMANDS``."""
        name = request.get("device")
        if not isinstance(name, str):
            return {"ok": False, "error": f'name the device: {{"command": "{command}", "device": "disk"}}'}
        try:
            device = self._devices.get(name)
            if device is None:
                raise HostError(f"no device {name!r} is served; there are: {', '.join(self._devices)}")
            if device.disk is None:
                raise HostError(f"a {device.type_name} device has no storage")
            if command == "reopen":
                await self._reopen(device, device.disk)
            stopped = DeviceCalls(device).ask("retry_storage", device.disk.retry_storage)
        except HyperbellError as error:
            return {"ok": False, "error": str(error)}
        structlog.get_logger().info(command, device=name)
        return {"ok": True, "device": name, "stopped": stopped}

    async def _reopen(self, device: Device, disk: DiskStorage) -> None:
        reopen = DeviceCalls(device).ask("reopening", disk.reopening)
        limiter = self._limiters.setdefault(device.name, trio.CapacityLimiter(1))
        with trio.move_on_after(REOPEN_SECONDS) as scope:
            await trio.to_thread.run_sync(reopen, abandon_on_cancel=True, limiter=limiter)
        if scope.cancelled_caught:
            raise HostError(
                f"{device.name}: its storage has not answered for {REOPEN_SECONDS:.0f} s; it may be opened later"
            )
