"""One daemon and one guest for a test: the configuration, the images, the machine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from guest.boot.initramfs import prepare_initramfs
from guest.boot.machine import Guest, Hypervisor, Machine, reconnecting, shared_memory
from guest.boot.pattern import SECTOR_SIZE, sector_content
from guest.boot.service import Daemon, free_port, serve
from guest.debian.kernel import Kernel, prepare_kernel

MIB = 1024 * 1024
DISK_SIZE = 64 * MIB
FROZEN_SIZE = 8 * MIB
FROZEN_WRITTEN = 1 * MIB
FROZEN_SEED = 99
SERIAL = "GUEST-TEST-01"

CONFIG = f"""
[daemon]
metrics = "127.0.0.1:PORT"

[workers.even]

[workers.odd]

[devices.disk]
type = "blk"
path = "disk.img"
socket = "disk.sock"
queue_size = 1024
serial = "{SERIAL}"
queues = 2
workers = ["even", "odd"]

[devices.frozen]
type = "blk"
path = "frozen.img"
socket = "frozen.sock"
read_only = true

[devices.entropy]
type = "rng"
socket = "entropy.sock"
"""


@dataclass(frozen=True)
class Variant:
    """One way to attach the devices.

    ``before`` stands before them on QEMU's command line, ``options`` belong to each, ``disk_options`` to the
    disk alone, ``append`` to the kernel's command line; ``ports`` gives each a PCI Express port.
    """

    name: str
    board: str = "pc"
    before: tuple[str, ...] = ()
    options: str = ""
    disk_options: str = ""
    append: str = ""
    ports: bool = False
    stress_requests: int = 2000  # for each of two threads

    @property
    def packed(self) -> bool:
        return "packed=on" in self.options

    @property
    def translated(self) -> bool:
        return "iommu_platform=on" in self.options

    @property
    def keys(self) -> str:
        """What a device's configuration says for it."""
        return "packed = true\n" * self.packed + "iommu = true\n" * self.translated


SPLIT = Variant("split")
PACKED = Variant("packed", options=",packed=on")
# Device-IOTLB and ATS: without them QEMU 7.2 does not tell a vhost-user back-end of the guest's domain-wide
# invalidations, and the back-end would write to pages that have long been somebody else's.
# ATS is a capability of PCI Express: each device needs a port of its own.
# QEMU 11 has no interrupt remapping without KVM, and does not start if it is left to choose.
VIOMMU = Variant(
    "viommu",
    board="q35",
    before=("-device", "intel-iommu,device-iotlb=on,intremap=off"),
    options=",iommu_platform=on,ats=on",
    disk_options=",queue-size=1024",  # seven pages a ring, which the guest takes from anywhere
    append="intel_iommu=on pci=lastbus=3",
    ports=True,
    stress_requests=100,  # every page costs a round trip to QEMU
)


class Testbed:
    """What every guest of these tests shares; made once a session."""

    __test__ = False  # not a class of tests, whatever its name begins with

    def __init__(self) -> None:
        """Raises ``PrepareError`` if this machine cannot run guests."""
        self.kernel: Kernel = prepare_kernel(print)
        self.initramfs: Path = prepare_initramfs(self.kernel, print)
        self.hypervisor = Hypervisor(print)
        self.reconnecting = reconnecting()

    @asynccontextmanager
    async def boot(
        self, folder: Path, variant: Variant, *, reboots: bool = False, initramfs: Path | None = None
    ) -> AsyncIterator[Guest]:
        """A guest with two CPUs and all devices of ``CONFIG``, whose sockets lie in ``folder``."""
        devices = [*variant.before, *shared_memory(256)]
        for name, device in (
            ("disk", f"vhost-user-blk-pci,num-queues=2,disable-legacy=on{variant.disk_options}"),
            ("frozen", "vhost-user-blk-pci,num-queues=1,disable-legacy=on"),
            ("entropy", "vhost-user-rng-pci"),
        ):
            # A test may restart the daemon. QEMU 7.2's rng does not know how to reconnect, and ends when told to.
            reconnect = self.reconnecting if name != "entropy" else ""
            devices += ["-chardev", f"socket,id={name},path={folder / name}.sock{reconnect}"]
            bus = ""
            if variant.ports:
                devices += ["-device", f"pcie-root-port,id=port-{name},chassis={len(devices)},hotplug=off"]
                bus = f",bus=port-{name}"
            devices += ["-device", f"{device},chardev={name}{variant.options}{bus}"]
        machine = Machine(
            self.kernel.image,
            initramfs or self.initramfs,
            devices,
            cpus=2,
            board=variant.board,
            append=variant.append,
            reboots=reboots,
        )
        async with self.hypervisor.boot(machine) as guest:
            yield guest


class Site:
    """The configuration and the images of one daemon, in ``folder``, for a guest that attaches them as ``variant``."""

    def __init__(self, folder: Path, variant: Variant = SPLIT) -> None:
        self.folder = folder
        self.disk = folder / "disk.img"
        self.frozen = folder / "frozen.img"
        self.config = folder / "test.toml"
        self.port = free_port()
        self.config.write_text(CONFIG.replace("PORT", str(self.port)).replace("type =", f"{variant.keys}type ="))
        for image, size in ((self.disk, DISK_SIZE), (self.frozen, FROZEN_SIZE)):
            image.touch()
            os.truncate(image, size)
        with self.frozen.open("r+b") as file:
            file.write(b"".join(sector_content(n, FROZEN_SEED) for n in range(FROZEN_WRITTEN // SECTOR_SIZE)))

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Daemon]:
        async with serve(self.config, self.folder, self.port) as daemon:
            yield daemon
