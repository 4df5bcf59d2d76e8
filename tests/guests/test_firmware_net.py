"""Firmware boots by a network interface of ours: from a user network, and over a switch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from guests import firmware
from guests.boot_images import CHECKED, U_BOOT_ADDRESS, U_BOOT_CHECK, boot_server_files, check_tools, u_boot_checked
from guests.boot_server import boot_server
from guests.firmware import BOOT_SECONDS, ServedBackend, is_legacy, net_arguments, operations, serving, started
from guests.testbed import Testbed

from guest.boot.machine import Guest
from guest.debian.cache import PrepareError
from virtio.backend.backend import Backend
from virtio.devices.net.device import Net, NetOptions
from virtio.native.worker import Worker

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def files(module_folder: Path) -> Path:
    """A boot server's folder."""
    check_tools()
    folder = module_folder / "tftp"
    folder.mkdir()
    module_folder.chmod(0o755)
    boot_server_files(folder)
    return folder


@dataclass(frozen=True)
class Case:
    """One firmware, what its machine's interface says further, and the GRUB that it gets by that name."""

    firmware: str
    options: str
    bootfile: str
    grub: str
    legacy: bool


# The ROM of QEMU's network interfaces has an iPXE for either firmware. Without it OVMF has a PXE of its own.
IPXE_LEGACY = Case("seabios", ",disable-modern=on", "grub.0", "pc", legacy=True)
IPXE_MODERN = Case("seabios", "", "grub.0", "pc", legacy=False)
IPXE_OF_UEFI = Case("ovmf", "", "grub.efi", "efi", legacy=False)
OVMF = Case("ovmf", ",romfile=", "grub.efi", "efi", legacy=True)
in_ground = pytest.mark.guest_full


async def boots(guest: Guest, backend: ServedBackend, case: Case) -> None:
    await guest.expect(f"GRUB runs: {case.grub}", BOOT_SECONDS)
    await guest.expect(CHECKED, BOOT_SECONDS)
    assert is_legacy(backend.accepted[-1]) == case.legacy
    nothing_broke(backend)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(IPXE_LEGACY, id="ipxe-legacy"),
        pytest.param(IPXE_OF_UEFI, id="ipxe-uefi", marks=in_ground),
        pytest.param(OVMF, id="ovmf"),
    ],
)
async def test_firmware_boots_grub_from_a_user_network_and_grub_reads_a_file_there(
    testbed: Testbed, files: Path, folder: Path, case: Case
) -> None:
    net = NetOptions(backend="user", bootfile=case.bootfile, tftp=files, restrict=True)
    async with (
        Worker("net") as worker,
        serving(Net("net", net, 1, 256), folder, worker) as backend,
        started(testbed.hypervisor, case.firmware, folder, net_arguments(folder, "net", case.options)) as guest,
    ):
        await boots(guest, backend, case)


async def test_u_boot_reads_a_file_from_a_user_network(testbed: Testbed, files: Path, folder: Path) -> None:
    net = NetOptions(backend="user", tftp=files, restrict=True)
    async with (
        Worker("net") as worker,
        serving(Net("net", net, 1, 256), folder, worker) as backend,
        started(testbed.hypervisor, "u-boot", folder, net_arguments(folder, "net")) as guest,
    ):
        await guest.expect("U-Boot 20", BOOT_SECONDS)
        await guest.type("\n" * 20)  # some may be lost: its UART is set up about now
        await guest.expect("Hit any key to stop autoboot", BOOT_SECONDS)
        load = f"tftpboot {U_BOOT_ADDRESS} payload"
        await guest.type(f"pci enum; virtio scan; setenv autoload no; dhcp; {load}; {U_BOOT_CHECK}\n")
        await guest.expect(u_boot_checked((files / "payload").read_bytes()), BOOT_SECONDS)
        nothing_broke(backend)


@pytest.mark.parametrize(
    "case",
    [pytest.param(IPXE_MODERN, id="ipxe"), pytest.param(OVMF, id="ovmf", marks=in_ground)],
)
async def test_firmware_boots_grub_over_a_switch_from_another_station(
    testbed: Testbed, files: Path, folder: Path, case: Case
) -> None:
    async with (
        Worker("lan") as worker,
        serving(Net("net", NetOptions(backend="switch", switch="lan"), 1, 256), folder, worker) as backend,
        boot_server(worker, "lan", files, case.bootfile) as server,
        started(testbed.hypervisor, case.firmware, folder, net_arguments(folder, "net", case.options)) as guest,
    ):
        await boots(guest, backend, case)
        assert {case.bootfile, "payload", "sums"} <= set(server.served)


def nothing_broke(backend: Backend) -> None:
    for name in ("receive", "transmit"):
        requests, errors = operations(backend, name)
        assert requests > 0
        assert errors == 0
    assert not any(queue.broken for queue in backend.stats().queues)


@pytest.mark.parametrize(
    ("missing", "package", "arguments"),
    [
        ("U_BOOT", "u-boot-qemu", lambda folder: firmware.firmware("u-boot", folder)),
        ("OVMF", "ovmf", lambda folder: firmware.firmware("ovmf", folder)),
        ("ROMS", "ipxe-qemu", lambda folder: firmware.net_arguments(folder, "net")),
    ],
    ids=["u-boot", "ovmf", "ipxe"],
)
def test_firmware_that_is_not_installed_is_named_with_its_package(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    package: str,
    arguments: Callable[[Path], list[str]],
) -> None:
    path = folder / "none"
    monkeypatch.setattr(firmware, missing, (path,) if missing == "ROMS" else path)
    with pytest.raises(PrepareError, match=rf"^{path}\S* is not installed; install the Debian package '{package}'$"):
        arguments(folder)
