"""What an operator wants attached, and what a virtual machine monitor must be told for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from config.loader import Config, Device
from daemon.attach.qemu_version import QemuVersion
from daemon.devices.classes import device_class
from virtio.device import Device as VirtioDevice
from virtio.devices.net.device import NetOptions
from virtio.errors import HostError

MODERATE_QUEUE_SIZE: Final = 256
"""What is advised where the configuration says nothing. A device can do more, but a larger ring only costs memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """Devices of one guest, and what the command line says of that guest.

    ``memory`` is the guest's RAM as QEMU writes sizes. ``accel`` is "kvm" or "tcg", ``None``: the command line does not
    say. ``machine`` "" leaves the machine type to the rest of QEMU's command line. ``qemu`` gives the version of QEMU;
    it may have to ask QEMU, so only what is for QEMU calls it.
    """

    devices: Sequence[Device]
    memory: str
    qemu: Callable[[], QemuVersion]
    accel: str | None = None
    machine: str = ""


@dataclass(slots=True)
class Answer:
    """What to tell the monitor (``text``), what no option says (``notes``), and devices it cannot have, with why."""

    text: str = ""
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def chosen_devices(config: Config, names: Sequence[str], guest: str | None) -> list[Device]:
    """The devices of one guest: those named, or those of ``guest``, or all. ``HostError``: there is no such choice."""
    for name in names:
        if name not in config.devices:
            raise HostError(f'{config.path} has no device "{name}"; it has: {", ".join(config.devices)}')
    devices = [device for device in config.devices.values() if not names or device.name in names]
    guests = sorted({device.common.guest for device in config.devices.values() if device.common.guest is not None})
    if guest is not None:
        if guest not in guests:
            have = f"its guests are: {', '.join(guests)}" if guests else "none of its devices has the key guest"
            raise HostError(f'{config.path} has no device with guest = "{guest}"; {have}')
        for device in devices:
            if names and device.common.guest != guest:
                raise HostError(f'{config.path}: the device "{device.name}" is not one of the guest "{guest}"')
        return [device for device in devices if device.common.guest == guest]
    if len({device.common.guest for device in devices}) > 1:
        without = [device.name for device in devices if device.common.guest is None]
        others = f" (without the key guest: {', '.join(without)})" if without else ""
        raise HostError(
            f"{config.path} has devices of several guests{others}; choose one guest: "
            f"{' or '.join(f'--guest {name}' for name in guests)}; or name the devices"
        )
    return devices


def virtio_id(device: Device) -> int:
    """The number of the device's type in the specification."""
    return device_class(device.common.type).virtio_id


def virtqueues(device: Device) -> int:
    """How many virtqueues the device has in all."""
    return device_class(device.common.type).virtqueues(device.options, device.queues)


def has_config_space(device: Device) -> bool:
    """Whether the device's class has a config space at all."""
    return device_class(device.common.type).config_space is not VirtioDevice.config_space


def queue_size(device: Device, most: int) -> int:
    """The size to advise for each queue: what the configuration says, else a moderate one; at most ``most``."""
    said = "queue_size" in device.common.model_fields_set
    return min(device.common.queue_size, most if said else min(most, MODERATE_QUEUE_SIZE))


def mebibytes(memory: str) -> int:
    """``memory`` as a number."""
    return int(memory[:-1]) * (1024 if memory.endswith("G") else 1)


def net_options(device: Device) -> NetOptions:
    assert isinstance(device.options, NetOptions)
    return device.options


def mac(device: Device) -> str:
    """The address of a network interface."""
    return net_options(device).address(device.name).hex(":")


def socket_path(device: Device) -> Path:
    return device.common.socket


def connects(device: Device) -> bool:
    """Whether the daemon connects to the monitor, which listens."""
    return device.common.mode == "connect"


def cannot_listen(device: Device, monitor: str) -> str:
    """Why ``monitor`` cannot have a device that connects to it."""
    return f'device "{device.name}": mode = "connect" is for a front-end that listens, and {monitor} only connects'
