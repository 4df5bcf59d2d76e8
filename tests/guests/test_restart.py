"""A guest keeps its disk when it reboots, and when the daemon is killed or restarted beneath it."""

from __future__ import annotations

from pathlib import Path

import pytest
from guests.testbed import MIB, SPLIT, Site, Testbed

from guest.pattern import check_pattern

pytestmark = pytest.mark.guest

NEW_DRIVER = "another driver begins"
SPAN = f"0 {2 * MIB}"


async def test_disk_survives_a_reboot_of_the_guest_and_a_crash_and_a_restart_of_the_daemon(
    testbed: Testbed, folder: Path
) -> None:
    site = Site(folder)
    # Without INFLIGHT_SHMFD a front-end resumes only an idle disk: each round ends with the disk idle.
    async with site.serve() as daemon, testbed.boot(folder, SPLIT, reboots=True) as guest:
        await guest.run(f"diskcheck first write /dev/vda {SPAN} 1 && diskcheck first flush /dev/vda")

        await guest.run("head -c 16 /dev/hwrng | od -An -tu1")
        log = site.folder / "daemon.log"
        assert NEW_DRIVER not in log.read_text()
        await guest.reboot()
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
