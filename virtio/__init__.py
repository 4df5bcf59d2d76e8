"""What a device's author needs: ``from virtio import Chain, Device, DeviceOptions, GuestError, HostError, Queue``.

These six names and what their docstrings promise stay as they are through all versions 1.x (before 1.0: through a
minor version); everything else in this package may change. docs/your-own-device.md is the tutorial.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from virtio.device import Chain, Device, DeviceOptions, Queue
    from virtio.errors import GuestError, HostError

__all__ = ["Chain", "Device", "DeviceOptions", "GuestError", "HostError", "Queue"]

_WHERE: Final = {
    "Chain": "virtio.device",
    "Device": "virtio.device",
    "DeviceOptions": "virtio.device",
    "GuestError": "virtio.errors",
    "HostError": "virtio.errors",
    "Queue": "virtio.device",
}


def __getattr__(name: str) -> object:
    # Looked up when asked for: whoever wants one module of the package need not load the data plane with it.
    if name not in _WHERE:
        raise AttributeError(f"module 'virtio' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
