"""QEMU's front-ends: which there are in which version, what their queues are like, and what each cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from config.loader import Device
from daemon.attach.qemu_version import OLDEST, QemuVersion
from daemon.attach.request import virtio_id
from virtio import spec

QUEUE_SIZE_MAX: Final = 1024  # QEMU's VIRTQUEUE_MAX_SIZE: it refuses to start with more
NET_QUEUE_SIZE_MIN: Final = 256  # smaller ones it refuses for a network interface
TEST_DEVICE: Final = "vhost-user-test-device-pci"
TEST_DEVICE_IDS: Final = frozenset({*range(1, 14), *range(16, 42)})
"""QEMU (seen: 11.1.3) aborts over a number that it has no name for: 14, 15, 42 to 44, 46 and more."""
TEST_DEVICE_SINCE: Final = QemuVersion(10, 2)
RECONNECT_MS_SINCE: Final = QemuVersion(9, 2)  # reconnect= ends with 10.1
VECTORS_UNMASKED_SINCE: Final = QemuVersion(10, 0)
"""Older ones (seen: 7.2) follow a null pointer under TCG when a guest unmasks a vector of a vhost-user interface."""
GENERIC_SINCE: Final = QemuVersion(9, 0)
"""Since then rng, gpio, i2c and input are made of one generic front-end, which needs no KVM."""
NO_REMAPPING_SINCE: Final = QemuVersion(11, 0)
"""Since then intel-iommu remaps interrupts by default, which is not to be had without KVM."""
EVERY_QUEUE_1024: Final = (10, 0)
"""QEMU 10.0.13, as in Debian 13, gives every virtqueue 1,024 entries, whatever is asked for."""


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """QEMU's device for one type of ours.

    ``queue_options`` says whether it takes num-queues and queue-size. ``queue_sizes``: what its queues have from which
    version on, where it leaves no choice. ``reconnects``: whether it comes back after the daemon has restarted.
    """

    driver: str
    since: QemuVersion = OLDEST
    queue_options: bool = False
    queue_sizes: Sequence[tuple[QemuVersion, int]] = ()
    reconnects: bool = False

    def queue_size(self, version: QemuVersion) -> int:
        """The entries that its queues have whatever is asked for; 0: it can be asked."""
        return max(((since, size) for since, size in self.queue_sizes if since <= version), default=(version, 0))[1]


FRONT_ENDS: Final = {
    spec.VIRTIO_ID_NET: FrontEnd("virtio-net-pci", reconnects=True),
    spec.VIRTIO_ID_BLOCK: FrontEnd("vhost-user-blk-pci", queue_options=True, reconnects=True),
    spec.VIRTIO_ID_RNG: FrontEnd("vhost-user-rng-pci", queue_sizes=[(OLDEST, 4)]),
    17: FrontEnd("vhost-user-rtc-pci", since=QemuVersion(11, 1)),
    spec.VIRTIO_ID_INPUT: FrontEnd("vhost-user-input-pci", queue_sizes=[(OLDEST, 64), (GENERIC_SINCE, 4)]),
    spec.VIRTIO_ID_VSOCK: FrontEnd("vhost-user-vsock-pci", queue_sizes=[(OLDEST, 128)]),
    25: FrontEnd("vhost-user-snd-pci", since=QemuVersion(9, 0)),
    32: FrontEnd("vhost-user-scmi-pci", since=QemuVersion(8, 1)),
    spec.VIRTIO_ID_I2C_ADAPTER: FrontEnd("vhost-user-i2c-pci", queue_sizes=[(OLDEST, 4)]),
    spec.VIRTIO_ID_GPIO: FrontEnd("vhost-user-gpio-pci", queue_sizes=[(OLDEST, 256), (GENERIC_SINCE, 64)]),
    45: FrontEnd("vhost-user-spi-pci", since=QemuVersion(11, 0)),
}
"""By virtio_id: what the guest sees behind a front-end is the same for any class of it."""

ANY_TYPE: Final = FrontEnd(TEST_DEVICE, since=TEST_DEVICE_SINCE)
"""For every other type of TEST_DEVICE_IDS. (vhost-user-device, since 9.0, cannot be made by a command line.)"""


def front_end(device: Device, version: QemuVersion) -> FrontEnd | None:
    """What attaches ``device``; ``None``: nothing does."""
    number = virtio_id(device)
    if number == spec.VIRTIO_ID_NET and device.common.type != "net":
        return None  # its front-end shows the guest a config space of its own, and a class does not say what is in it
    own = FRONT_ENDS.get(number)
    if own is not None and own.since <= version:
        return own
    return ANY_TYPE if version >= ANY_TYPE.since and number in TEST_DEVICE_IDS else None


def why_not(device: Device, version: QemuVersion, accel: str | None, machine: str = "") -> str:
    """Why QEMU cannot have ``device``; "" when it can."""
    found = front_end(device, version)
    size = device.common.queue_size
    if found is None:
        return f'device "{device.name}": {_missing(device, version)}'
    if device.common.iommu and machine == "pc":
        return f'device "{device.name}": iommu = true takes a virtual IOMMU, which QEMU has on q35 and not on pc'
    if found is FRONT_ENDS[spec.VIRTIO_ID_NET] and size < NET_QUEUE_SIZE_MIN:
        return (
            f'device "{device.name}": the queues of QEMU\'s network interface have {NET_QUEUE_SIZE_MIN} to '
            f"{QUEUE_SIZE_MAX} entries; set queue_size accordingly, or leave it out"
        )
    if virtio_id(device) == spec.VIRTIO_ID_INPUT and version < GENERIC_SINCE and accel == "tcg":
        return f'device "{device.name}": QEMU {version} attaches input devices only where the guest runs with KVM'
    least = found.queue_size(version)
    if size < least:
        return (
            f'device "{device.name}": the queues of {found.driver} of QEMU {version} have {least} entries; '
            f"set queue_size = {least} or more, or leave it out"
        )
    return ""


def _missing(device: Device, version: QemuVersion) -> str:
    number = virtio_id(device)
    kind = f"QEMU {version} has no vhost-user front-end for a {device.common.type} device (type number {number})"
    if number == spec.VIRTIO_ID_NET:
        return f"{kind}, but for the type net"
    own = FRONT_ENDS.get(number)
    if own is not None:
        return f"{kind}; QEMU {own.since} has one: {own.driver}"
    if number not in TEST_DEVICE_IDS:
        return f"{kind}; from {TEST_DEVICE_SINCE} on it attaches the numbers 1 to 13 and 16 to 41"
    return f"{kind}; QEMU {TEST_DEVICE_SINCE} has one: {TEST_DEVICE}"


def notes(devices: Sequence[Device], version: QemuVersion, accel: str | None) -> Iterator[str]:
    """What no option says about ``devices``, which QEMU can have."""
    found = [(device, front_end(device, version)) for device in devices]
    lost = [device for device, end in found if end is not None and not end.reconnects]
    if lost:
        yield (
            f"QEMU cannot reconnect {_names(lost)}: after a restart of the daemon each is dead until it is plugged in "
            "again (in QEMU's monitor: device_del NAME, then chardev-add and device_add as printed, another id for "
            "the chardev), or until QEMU is started again"
        )
    behind = [device for device in devices if device.common.iommu]
    if behind and version >= NO_REMAPPING_SINCE and accel is None:
        yield f"without KVM (TCG), intel-iommu of QEMU {version} needs intremap=off; --accel tcg prints it"
    small = [device for device in devices if device.common.queue_size < QUEUE_SIZE_MAX]
    if version[:2] == EVERY_QUEUE_1024 and small:
        yield (
            f"QEMU {version[0]}.{version[1]}.13 (Debian 13) gives each queue 1024 entries whatever is asked for: leave "
            f"queue_size out for {_names(small)}, or set 1024 or more"
        )
    inputs = [device for device in devices if virtio_id(device) == spec.VIRTIO_ID_INPUT]
    if inputs and version < GENERIC_SINCE and accel is None:
        yield f"without KVM (TCG), QEMU {version} does not start with {_names(inputs)}"
    pins = [device for device in devices if virtio_id(device) == spec.VIRTIO_ID_GPIO]
    if pins and version < GENERIC_SINCE:
        yield f"QEMU {version} does not pass on the interrupts of {_names(pins)}"
    interfaces = [device for device in devices if virtio_id(device) == spec.VIRTIO_ID_NET]
    if interfaces and version < VECTORS_UNMASKED_SINCE and accel is None:
        yield (
            f"without KVM (TCG), QEMU {version} crashes over {_names(interfaces)} as printed; "
            "--accel tcg prints what it takes"
        )


def _names(devices: Sequence[Device]) -> str:
    return ", ".join(f"{device.name} ({device.common.type})" for device in devices)
