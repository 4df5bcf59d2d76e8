"""A guest keeps its disk when it reboots, and when the daemon is killed or restarted beneath it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from guests.monitor import monitor, monitor_options
from guests.testbed import MIB, Site, Testbed

from guest.boot.machine import Machine
from guest.boot.pattern import check_pattern
from guest.boot.service import qemu_arguments

pytestmark = pytest.mark.guest

NEW_DRIVER = "another driver begins"
SPAN = f"0 {2 * MIB}"
DRAWN = "[ $(head -c 16 /dev/hwrng | wc -c) = 16 ]"


async def machine(testbed: Testbed, site: Site, *, reboots: bool = False) -> Machine:
    """A guest whose devices are attached by what ``hyperbell qemu-args`` prints, word by word."""
    printed = await qemu_arguments(site.config, 256, accel=testbed.hypervisor.acceleration.name)
    return Machine(testbed.kernel.image, testbed.initramfs, printed, cpus=2, reboots=reboots)


async def test_disk_survives_a_reboot_of_the_guest_and_a_crash_and_a_restart_of_the_daemon(
    testbed: Testbed, folder: Path
) -> None:
    site = Site(folder)
    # Without INFLIGHT_SHMFD a front-end resumes only an idle disk: each round ends with the disk idle.
    attached = await machine(testbed, site, reboots=True)
    async with site.serve() as daemon, testbed.hypervisor.boot(attached) as guest:
        await guest.run(f"diskcheck first write /dev/vda {SPAN} 1 && diskcheck first flush /dev/vda")

        await guest.run(DRAWN)
        log = site.folder / "daemon.log"
        assert NEW_DRIVER not in log.read_text()
        await guest.reboot()
        await guest.run(DRAWN)  # the new driver has begun
        # QEMU 7.2 tells a Python device of no reset.
        assert [line for line in log.read_text().splitlines() if NEW_DRIVER in line and "entropy" in line]
        await guest.run(f"diskcheck rebooted verify /dev/vda {SPAN} 1")
        assert (await daemon.metrics()).total("hyperbell_protocol_errors_total") == 0

        await daemon.kill()
        assert site.folder.joinpath("disk.sock").exists(), "a killed daemon cannot have removed its socket"
        async with site.serve() as second:
            # QEMU reconnects by itself; what the guest asks meanwhile waits for it.
            await guest.run(f"diskcheck killed verify /dev/vda {SPAN} 1 && diskcheck killed write /dev/vda {SPAN} 2")
            assert check_pattern(site.disk, 0, 2 * MIB, 2) == ""
            metrics = await second.metrics()
            assert metrics.total("hyperbell_frontend_connected", device="disk") == 1
            assert metrics.total("hyperbell_requests_total", device="disk", op="write") > 0
            await second.stop()

        async with site.serve() as third:
            await guest.run(f"diskcheck stopped verify /dev/vda {SPAN} 2")
            assert (await third.metrics()).total("hyperbell_requests_total", device="disk", op="read") > 0
            await guest.power_off()


async def test_a_device_that_qemu_cannot_reconnect_works_again_once_it_is_plugged_in_as_the_note_says(
    testbed: Testbed, folder: Path
) -> None:
    site = Site(folder)
    attached = await machine(testbed, site)
    words = list(attached.devices)
    (chardev,) = [word for word in words if word.startswith("socket,id=char-entropy,")]
    (device,) = [word for word in words if word.startswith("vhost-user-rng-pci,")]
    attached = replace(attached, devices=[*words, *monitor_options(folder)])
    async with site.serve() as daemon, testbed.hypervisor.boot(attached) as guest, monitor(folder) as qemu:
        await guest.run(DRAWN)
        await daemon.kill()
        async with site.serve() as second:
            assert (await second.metrics()).total("hyperbell_frontend_connected", device="entropy") == 0
            assert await qemu.type("device_del entropy") == ""
            await qemu.event("DEVICE_DELETED", device="entropy")
            # The old name is taken for as long as QEMU runs, also when it has removed the chardev.
            assert await qemu.type("chardev-add " + chardev.replace("=char-entropy", "=new-entropy")) == ""
            assert await qemu.type("device_add " + device.replace("=char-entropy", "=new-entropy")) == ""
            await guest.run(f"until {DRAWN} 2>/dev/null; do :; done")
            assert (await second.metrics()).total("hyperbell_requests_total", device="entropy") > 0
            await guest.power_off()
