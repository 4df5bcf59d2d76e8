"""What an operator does about a disk whose storage failed, while the daemon runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import structlog

from daemon.running.assembly import named
from daemon.running.files import Files, NoAnswerError, path_of
from virtio.backend.device_calls import DeviceCalls
from virtio.capabilities import DiskStorage
from virtio.device import Device
from virtio.errors import HostError, HyperbellError

COMMANDS: Final = ("reopen", "retry")


class Disks:
    """The disks among ``devices``, by name."""

    def __init__(self, devices: Mapping[str, Device], files: Files) -> None:
        self._devices = devices
        self._files = files

    async def answer(self, command: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one of ``COMMANDS``."""
        name = request.get("device")
        if not isinstance(name, str):
            return {"ok": False, "error": f'name the device: {{"command": "{command}", "device": "disk"}}'}
        try:
            device = named(self._devices, name)
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
        try:
            await self._files.run(device.name, reopen)
        except NoAnswerError:
            reason = self._files.no_answer(path_of(device.options))
            raise HostError(f"{device.name}: {reason}; it may be opened later") from None
