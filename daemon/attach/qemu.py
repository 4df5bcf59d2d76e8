"""The options of QEMU that attach the configured devices."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from config.loader import Device
from daemon.attach import qemu_front_ends
from daemon.attach.qemu_front_ends import (
    ANY_TYPE,
    NO_REMAPPING_SINCE,
    QUEUE_SIZE_MAX,
    RECONNECT_MS_SINCE,
    VECTORS_UNMASKED_SINCE,
    front_end,
    why_not,
)
from daemon.attach.qemu_version import QemuVersion
from daemon.attach.request import (
    Answer,
    Request,
    connects,
    has_config_space,
    mac,
    net_options,
    queue_size,
    virtio_id,
    virtqueues,
)
from virtio import spec

PORT_NOTIFY: Final = "modern-pio-notify"  # QEMU's property that gives a device a notify port: bells are ports
HYPERCALL_CPU: Final = "host,hv-relaxed"  # the least that makes KVM take Hyper-V's hypercalls from this guest
RECONNECT_MS: Final = 200
CONFIG_SIZE: Final = 256
"""What the front-end for any type asks for: the largest config space that vhost-user carries; zeroes follow ours."""

Value = str | int | bool


@dataclass(frozen=True, slots=True)
class Attached:
    """One device as QEMU is told of it. ``netdev`` is empty but for a network interface."""

    chardev: str
    netdev: str
    properties: dict[str, Value]

    def options(self) -> list[list[str]]:
        """Options and their arguments as plain words."""
        netdev = [["-netdev", self.netdev]] if self.netdev else []
        return [["-chardev", self.chardev], *netdev, ["-device", words(self.properties)]]

    def json_options(self) -> list[list[str]]:
        """The same with the device as JSON: QEMU makes all of those after each other, and plain ones before them."""
        netdev = [["-netdev", self.netdev]] if self.netdev else []
        return [["-chardev", self.chardev], *netdev, ["-device", json.dumps(self.properties)]]


def attach(request: Request) -> Answer:
    """QEMU's options, one a line for a shell."""
    devices, answer = possible(request)
    if devices:
        answer.text = pasteable(qemu_arguments(request, devices, hypercall=False))
    return answer


def possible(request: Request) -> tuple[list[Device], Answer]:
    """The devices that QEMU can have, and an answer with what is to be said of all of them."""
    version, answer = request.qemu(), Answer()
    devices = []
    for device in request.devices:
        fault = why_not(device, version, request.accel, request.machine)
        if fault:
            answer.refused.append(fault)
        else:
            devices.append(device)
    answer.notes += qemu_front_ends.notes(devices, version, request.accel)
    return devices, answer


def qemu_arguments(request: Request, devices: Sequence[Device], *, hypercall: bool) -> list[list[str]]:
    """QEMU's options for ``devices``, which it can have, each an option and its argument.

    ``hypercall``: with what the guest needs in order to ring by hypercall.
    The guest's memory has to be shared memory, for the daemon maps it.
    """
    translated = [device for device in devices if device.common.iommu]
    machine = "q35" if translated else request.machine
    options = [
        ["-m", request.memory],
        ["-object", f"memory-backend-memfd,id=mem,size={request.memory},share=on"],
        ["-machine", ",".join(filter(None, (machine, "memory-backend=mem")))],
    ]
    if hypercall:
        options.append(["-cpu", HYPERCALL_CPU])
    if translated:  # it stands before the devices behind it
        options.append(["-device", f"intel-iommu,device-iotlb=on{_remapping(request)}"])
    for device in devices:
        told = attached(device, request.qemu(), request.accel, hypercall=hypercall)
        if device in translated:
            # ATS is a capability of PCI Express, so each device has a port of its own.
            port = f"port-{device.name}"
            options.append(["-device", f"pcie-root-port,id={port},chassis={translated.index(device) + 1}"])
            told.properties["bus"] = port
        options += told.options()
    return options


def _remapping(request: Request) -> str:
    return ",intremap=off" if request.accel == "tcg" and request.qemu() >= NO_REMAPPING_SINCE else ""


def pasteable(options: Iterable[list[str]]) -> str:
    """``options`` for a shell, one a line, each line but the last ending in a backslash."""
    return " \\\n".join(shlex.join(option) for option in options)


def words(properties: dict[str, Value]) -> str:
    """Properties in QEMU's option syntax, the driver first."""
    driver, *others = properties.items()
    return ",".join([str(driver[1]), *(f"{name}={_word(value)}" for name, value in others)])


def _word(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")  # a comma ends a value; two of them stand for one


def attached(device: Device, version: QemuVersion, accel: str | None, *, hypercall: bool) -> Attached:
    """``device`` as QEMU ``version`` is told of it; ``why_not`` found nothing."""
    end = front_end(device, version)
    assert end is not None, "why_not() told the caller"
    chardev = f"char-{device.name}"
    channel = f"socket,id={chardev},path={_word(str(device.common.socket))}"
    if connects(device):
        channel += ",server=on"  # a server waits for the daemon again by itself
    elif end.reconnects:
        channel += f",reconnect-ms={RECONNECT_MS}" if version >= RECONNECT_MS_SINCE else ",reconnect=1"
    properties: dict[str, Value] = {"driver": end.driver}
    netdev = ""
    if virtio_id(device) == spec.VIRTIO_ID_NET:
        netdev = f"vhost-user,id=net-{device.name},chardev={chardev}"
        netdev += f",queues={device.queues}" if device.queues > 1 else ""
        properties |= _interface(device, interrupts=accel != "tcg" or version >= VECTORS_UNMASKED_SINCE)
    else:
        properties["chardev"] = chardev
        if end is ANY_TYPE:
            properties |= {
                "virtio-id": virtio_id(device),
                "num_vqs": virtqueues(device),
                "vq_size": queue_size(device, QUEUE_SIZE_MAX),
            }
            if has_config_space(device):
                properties["config_size"] = CONFIG_SIZE  # without a config space QEMU would not start
        elif end.queue_options:
            properties |= {"num-queues": device.queues, "queue-size": queue_size(device, QUEUE_SIZE_MAX)}
        if not end.reconnects:
            properties["id"] = device.name  # by which the monitor unplugs it
    if device.common.packed:
        properties["packed"] = True
    if device.common.iommu:
        # Without ATS, QEMU 7.2 passes on no invalidation of a whole domain. Conventional PCI ignores it.
        properties |= {"iommu_platform": True, "ats": True}
    if hypercall:
        properties[PORT_NOTIFY] = True
    return Attached(channel, netdev, properties)


def _interface(device: Device, *, interrupts: bool) -> dict[str, Value]:
    """QEMU shows the guest a config space of its own, so it has to be told what is in ours."""
    properties: dict[str, Value] = {"netdev": f"net-{device.name}", "mac": mac(device)}
    mtu = net_options(device).mtu
    if mtu is not None:
        properties["host_mtu"] = mtu
    if device.queues > 1:
        properties["mq"] = True
        # An interrupt for each queue, one for the control queue and one for changes of the configuration.
        properties["vectors"] = 2 * device.queues + 2
    if not interrupts:
        properties["vectors"] = 0
    size = queue_size(device, QUEUE_SIZE_MAX)
    return properties | {"rx_queue_size": size, "tx_queue_size": size}
