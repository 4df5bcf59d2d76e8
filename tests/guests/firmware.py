"""Machines that firmware starts, and devices served for them in this process, so that tests see what was negotiated."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
from guests.boot_images import need

from guest.boot.accel import Acceleration
from guest.boot.machine import QEMU, Guest, Hypervisor, Machine, shared_memory, start_machine
from transports.vhost_user.serving.server import VhostUserServer
from virtio.backend.backend import Backend
from virtio.device import Device
from virtio.native.worker import Worker
from virtio.socket_file import Listen
from virtio.spec import VIRTIO_F_VERSION_1

MEMORY_MIB = 512  # with 256, GRUB under OVMF has too little in one piece for Linux 7.3
CPUS = 4
BOOT_SECONDS = 90.0
OVMF = Path("/usr/share/OVMF")
ROMS = tuple(Path(folder, "efi-virtio.rom") for folder in ("/usr/share/qemu", "/usr/lib/ipxe/qemu"))  # Debian 13, 12
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


class FirmwareGuest(Guest):
    """A machine whose firmware takes commands on the console."""

    async def type(self, text: str) -> None:
        await self._transmit(text.encode())


def firmware(kind: str, folder: Path) -> list[str]:
    """QEMU's arguments for ``kind``. ``PrepareError`` names the package that has it."""
    if kind == "seabios":
        return []  # QEMU's own default
    if kind == "u-boot":
        need(U_BOOT, "u-boot-qemu")
        return ["-bios", str(U_BOOT)]
    need(OVMF / "OVMF_CODE_4M.fd", "ovmf")
    variables = Path(shutil.copy(OVMF / "OVMF_VARS_4M.fd", folder / "vars.fd"))
    return [
        *("-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
    ]


class ServedBackend(Backend):
    """Keeps what each driver ``accepted``, in order. No feature at all is an answer too: iPXE's to a legacy device."""

    def __init__(self, device: Device, worker: Worker) -> None:
        super().__init__(device, workers=[worker])
        self.accepted: list[int] = []

    def set_driver_features(self, bits: int) -> None:
        self.accepted.append(bits)
        super().set_driver_features(bits)


@contextlib.asynccontextmanager
async def serving(device: Device, folder: Path, worker: Worker) -> AsyncIterator[ServedBackend]:
    """``device`` at a socket in ``folder`` with its name."""
    with contextlib.closing(device):
        backend = ServedBackend(device, worker)
        async with backend, trio.open_nursery() as nursery:
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


def net_arguments(folder: Path, name: str, options: str = "") -> list[str]:
    """A network interface with the ROM that QEMU gives it, if ``options`` say nothing else."""
    if not any(rom.exists() for rom in ROMS):
        need(ROMS[0], "ipxe-qemu")
    # Without MSI-X: under TCG, QEMU 7.2 follows a null pointer when a vector is unmasked.
    return [
        *("-chardev", f"socket,id={name},path={folder / name}.sock"),
        *("-netdev", f"vhost-user,id=net-{name},chardev={name}"),
        *("-device", f"virtio-net-pci,netdev=net-{name},vectors=0,bootindex=0{options}"),
    ]


@contextlib.asynccontextmanager
async def started(
    hypervisor: Hypervisor, kind: str, folder: Path, devices: Sequence[str]
) -> AsyncIterator[FirmwareGuest]:
    """A machine with that firmware and these devices; ended when the block is left."""
    machine = FirmwareMachine(
        kernel=Path(),
        initramfs=Path(),
        devices=[*shared_memory(MEMORY_MIB), *devices],
        memory_mib=MEMORY_MIB,
        cpus=CPUS,
        firmware=firmware(kind, folder),
    )
    guest = FirmwareGuest(await start_machine(machine.command(hypervisor.acceleration)), lambda line: None)
    try:
        yield guest
    finally:
        await guest.end()


def is_legacy(accepted: int) -> bool:
    return not accepted >> VIRTIO_F_VERSION_1 & 1


def operations(backend: Backend, name: str) -> tuple[int, int]:
    """(requests, errors) of one operation, over all queues."""
    found = [queue.ops[name] for queue in backend.stats().queues if name in queue.ops]
    return sum(each.requests for each in found), sum(each.errors for each in found)
