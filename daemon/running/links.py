"""The cables of network interfaces: an operator plugs them in and out while the daemon runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from daemon.running.assembly import named
from daemon.state import DaemonState
from virtio.backend.device_calls import DeviceCalls
from virtio.device import Device
from virtio.errors import HostError

STATES: Final = {"up": True, "down": False}


class Links:
    """The links of ``devices``, by name."""

    def __init__(self, devices: Mapping[str, Device]) -> None:
        self._devices = devices

    def set(self, name: str, up: bool) -> bool:
        """Whether it is another state than before. ``HostError``: there is no such interface."""
        device = named(self._devices, name)
        port = device.port
        if port is None:
            raise HostError(f"a {device.type_name} device has no link")
        return DeviceCalls(device).ask("set_link", lambda: port.set_link(up))


def guest_is_told(name: str, state: DaemonState) -> bool:
    """Whether a guest that uses the device now hears of changes of its configuration."""
    for device in state.devices:
        if device.backend.device == name:
            return device.connection is None or device.connection.hears_changes
    return False
