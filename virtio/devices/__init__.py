"""The devices we have: one file each, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from virtio.device import Device
from virtio.devices.blk import Blk
from virtio.devices.console import Console
from virtio.devices.gpio import Gpio
from virtio.devices.i2c import I2c
from virtio.devices.input import Input
from virtio.devices.net import Net
from virtio.devices.rng import Rng
from virtio.devices.vsock import Vsock

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
