"""Firmware boots from a disk of ours, and the system that it starts takes the disk over, on the same connection."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio
from guests.boot_images import CHECKED, PARTITION_START, U_BOOT_STARTED, boot_disk, check_tools, u_boot_checked
from guests.firmware import (
    BOOT_SECONDS,
    CPUS,
    disk_arguments,
    is_legacy,
    operations,
    serving,
    started,
)
from guests.testbed import Testbed

from virtio.backend.backend import Backend
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.native.worker import Worker

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def disk(testbed: Testbed, module_folder: Path) -> Path:
    check_tools()
    return boot_disk(module_folder, testbed.kernel.image.with_name("vmlinuz"), testbed.initramfs)


@pytest.mark.parametrize("kind", ["seabios", "ovmf"])
async def test_firmware_starts_grub_and_grub_starts_linux_from_a_disk_of_several_queues(
    testbed: Testbed, disk: Path, folder: Path, kind: str
) -> None:
    """SeaBIOS drives a transitional device as a modern one, OVMF as a legacy one; GRUB goes through either."""
    device = Blk("disk", BlkOptions(path=disk), CPUS, 256)
    async with (
        Worker("disk") as worker,
        serving(device, folder, worker) as backend,
        started(testbed.hypervisor, kind, folder, disk_arguments(folder, "disk")) as guest,
    ):
        await guest.expect("GRUB runs: " + ("pc" if kind == "seabios" else "efi"), BOOT_SECONDS)
        await guest.expect(CHECKED, BOOT_SECONDS)
        await guest.expect("GRUB is done", BOOT_SECONDS)
        await guest.expect_userspace(BOOT_SECONDS)
        await guest.expect_ready()
        assert is_legacy(backend.accepted[0]) == (kind == "ovmf")
        assert not is_legacy(backend.accepted[-1])
        skipped = PARTITION_START >> 20
        answer = await guest.run(
            "result queues $(ls /sys/block/vda/mq | wc -l);"
            f"result sum $(dd if=/dev/vda bs=1M skip={skipped} 2>/dev/null | sha256sum)"
        )
        partition = hashlib.sha256((await trio.Path(disk).read_bytes())[PARTITION_START:]).hexdigest()
        assert answer.results == {"queues": str(CPUS), "sum": f"{partition} -"}
        await guest.power_off()
        nothing_broke(backend)


async def test_u_boot_reads_a_file_from_a_disk_of_several_queues(testbed: Testbed, disk: Path, folder: Path) -> None:
    device = Blk("disk", BlkOptions(path=disk), CPUS, 256)
    async with (
        Worker("disk") as worker,
        serving(device, folder, worker) as backend,
        started(testbed.hypervisor, "u-boot", folder, disk_arguments(folder, "disk")) as guest,
    ):
        await guest.expect(U_BOOT_STARTED, BOOT_SECONDS)
        payload = await trio.Path(disk.with_name("payload")).read_bytes()
        await guest.expect(u_boot_checked(payload), BOOT_SECONDS)
        nothing_broke(backend)


def nothing_broke(backend: Backend) -> None:
    requests, errors = operations(backend, "read")
    assert requests > 0
    assert errors == 0
    assert not any(queue.broken for queue in backend.stats().queues)
