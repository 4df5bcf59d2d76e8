"""Machines that firmware starts, and devices served for them in this process, so that tests see what was negotiated."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from guest.accel import Acceleration
from guest.cache import PrepareError
from guest.machine import QEMU, Guest, Hypervisor, Machine, shared_memory, start_machine
from transports.vhost_user.endpoint import Listen
from transports.vhost_user.server import VhostUserServer
from virtio.backend import Backend
from virtio.device import Device
from virtio.spec import VIRTIO_F_VERSION_1
from virtio.worker import Worker

MEMORY_MIB = 256
CPUS = 4
BOOT_SECONDS = 90.0
OVMF = Path("/usr/share/OVMF")
U_BOOT = Path("/usr/lib/u-boot/qemu-x86/u-boot.rom")


@dataclass(frozen=True)
class FirmwareMachine(Machine):
    """A machine without ``kernel`` and ``initramfs``: its firmware looks for something to boot."""

    firmware: Sequence[str] = ()

    def command(self, acceleration: Acceleration) -> list[str]:
        return [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *("-machine", self.board, *acceleration.qemu_arguments),
            *("-m", f"{self.memory_mib}M", "-smp", str(self.cpus)),
            *self.firmware,
            *self.devices,
        ]


def firmware(kind: str, folder: Path) -> list[str]:
    """QEMU's arguments for ``kind``. ``PrepareError`` names the package that has it."""
    if kind == "seabios":
        return []  # QEMU's own default
    if kind == "u-boot":
        if not U_BOOT.exists():
            raise PrepareError(f"{U_BOOT} is not installed; install the Debian package 'u-boot-qemu'")
        return ["-bios", str(U_BOOT)]
    if not (OVMF / "OVMF_CODE_4M.fd").exists():
        raise PrepareError(f"{OVMF} is not installed; install the Debian package 'ovmf'")
    variables = Path(shutil.copy(OVMF / "OVMF_VARS_4M.fd", folder / "vars.fd"))
    return [
        *("-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
    ]


@contextlib.asynccontextmanager
async def serving(device: Device, folder: Path, worker: Worker) -> AsyncIterator[Backend]:
    """``device`` at a socket in ``folder`` with its name."""
    with contextlib.closing(device):
        async with Backend(device, workers=[worker]) as backend, trio.open_nursery() as nursery:
            server = VhostUserServer(backend, Listen(folder / f"{device.name}.sock"))
            await nursery.start(server.run)
            yield backend
            nursery.cancel_scope.cancel()


def disk_arguments(folder: Path, name: str) -> list[str]:
    """A transitional device: each driver chooses how to drive it."""
    return [
        *("-chardev", f"socket,id={name},path={folder / name}.sock"),
        *("-device", f"vhost-user-blk-pci,chardev={name},num-queues={CPUS},bootindex=0"),
    ]


@contextlib.asynccontextmanager
async def started(hypervisor: Hypervisor, kind: str, folder: Path, devices: Sequence[str]) -> AsyncIterator[Guest]:
    """A machine with that firmware and these devices; ended when the block is left."""
    machine = FirmwareMachine(
        kernel=Path(),
        initramfs=Path(),
        devices=[*shared_memory(MEMORY_MIB), *devices],
        memory_mib=MEMORY_MIB,
        cpus=CPUS,
        firmware=firmware(kind, folder),
    )
    guest = Guest(await start_machine(machine.command(hypervisor.acceleration)), lambda line: None)
    try:
        yield guest
    finally:
        await guest.end()


def is_legacy(backend: Backend) -> bool:
    """The driver that uses the device now did not accept VIRTIO_F_VERSION_1."""
    return not backend.stats().driver_features >> VIRTIO_F_VERSION_1 & 1


def operations(backend: Backend, name: str) -> tuple[int, int]:
    """(requests, errors) of one operation, over all queues."""
    found = [queue.ops[name] for queue in backend.stats().queues if name in queue.ops]
    return sum(each.requests for each in found), sum(each.errors for each in found)
