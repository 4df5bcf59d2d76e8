"""The devices we have: one file each, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from virtio.device import Device
from virtio.devices.blk.device import Blk
from virtio.devices.console.device import Console
from virtio.devices.gpio.device import Gpio
from virtio.devices.i2c.device import I2c
from virtio.devices.input.device import Input
from virtio.devices.net.device import Net
from virtio.devices.rng import Rng
from virtio.devices.vsock.device import Vsock

REGISTRY: Final[Mapping[str, type[Device]]] = {
    "blk": Blk,
    "console": Console,
    "gpio": Gpio,
    "i2c": I2c,
    "input": Input,
    "net": Net,
    "rng": Rng,
    "vsock": Vsock,
}
"""Type name in the configuration to class."""
