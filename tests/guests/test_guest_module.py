"""The guest's kernel module: it builds here, and in a guest whose hypervisor offers nothing it does no harm.

What it is for, ringing by hypercall, needs KVM's Hyper-V code beneath the guest: that is ``tests/nested``. What it
decides is in ``tests/native/test_guest_module_rules.py``.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from guests.testbed import MIB, SPLIT, Site, Testbed

from guest.boot.console import results_of
from guest.boot.initramfs import module_order, prepare_initramfs
from guest.boot.machine import Guest
from guest.boot.module import SOURCES, module_sources, prepare_module
from guest.boot.pattern import BLOCK_SIZE, check_pattern, sum_generations
from guest.debian.cache import PrepareError
from guest.debian.headers import prepare_headers
from guest.debian.kernel import Kernel, prepare_kernel, read_module

pytestmark = pytest.mark.guest

MODULE = "/hyperbell.ko"
VERSION = tomllib.loads((SOURCES.parents[1] / "pyproject.toml").read_text())["project"]["version"]
SYSFS = "/sys/kernel/hyperbell"
QUEUES = "/sys/kernel/debug/hyperbell/queues"
MOUNT_DEBUGFS = "{ [ -d /sys/kernel/debug/hyperbell ] || mount -t debugfs debugfs /sys/kernel/debug; }"
# Every virtio device of the PCI bus, by the vendor's number.
ALL_PCI = (
    "for d in /sys/bus/pci/devices/*; do [ $(cat $d/vendor) = 0x1af4 ] &&"
    " echo ${{d##*/}} >/sys/bus/pci/drivers/virtio-pci/{action}; done; true"
)
CYCLES = 20
TAINT_ALLOWED = 1 << 12 | 1 << 13  # out of tree, unsigned
# The allocator checks and poisons: a use of freed memory shows at once, not when luck has it that somebody meets it.
# It slows a guest down, so only the test that sets hooks again boots with it.
CHECKED = replace(SPLIT, append="slub_debug=FZP")
VALIDATE_SLABS = "for cache in /sys/kernel/slab/*; do echo 1 >$cache/validate; done"
NO_COMMENTS = "cmd_checkdoc=:"  # with W=1 kernel-doc reads comments, for which it wants more of perl than a build needs
STRESSED = (32 * MIB, 4 * MIB)
STRESS_SEED = 11


def test_module_builds_for_the_kernel_that_guests_boot(testbed: Testbed) -> None:
    built = prepare_module(testbed.kernel, print)
    shown = subprocess.run(["modinfo", str(built)], capture_output=True, text=True, check=True).stdout
    facts = dict(line.split(":", 1) for line in shown.splitlines() if ":" in line)
    assert facts["vermagic"].split()[0] == testbed.kernel.release
    assert facts["license"].strip() == "GPL"
    assert facts["version"].strip() == VERSION
    assert prepare_module(testbed.kernel, print) == built


def test_module_its_package_and_its_page_are_of_the_projects_version() -> None:
    assert f'PACKAGE_VERSION="{VERSION}"' in (SOURCES / "dkms.conf").read_text().splitlines()
    assert f'MODULE_VERSION("{VERSION}");' in (SOURCES / "main.c").read_text().splitlines()
    page = (SOURCES / "README.md").read_text()
    assert set(re.findall(r"hyperbell[-/](\d[\d.]*\d)", page)) == {VERSION}


def test_module_builds_without_a_warning(testbed: Testbed, tmp_path: Path) -> None:
    for name, content in module_sources().items():
        (tmp_path / name).write_bytes(content)
    command = prepare_headers(testbed.kernel, print).make(tmp_path, "W=1", NO_COMMENTS, "modules")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "warning" in line] == []


def test_sources_are_small_files_under_the_kernels_licence() -> None:
    for name, content in module_sources().items():
        lines = content.decode().splitlines()
        assert "SPDX-License-Identifier: GPL-2.0" in lines[0], name
        assert len(lines) <= 400, name
        assert all(len(line.expandtabs(8)) <= 120 for line in lines), name


def test_kernel_without_headers_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERBELL_CACHE", str(tmp_path))
    gone = Kernel("linux-image-6.1.0-0-cloud-amd64", tmp_path / "vmlinux", tmp_path / "modules")
    with pytest.raises(PrepareError, match=r"linux-headers-6\.1\.0-0-cloud-amd64.*apt-get update.*remove"):
        prepare_module(gone, print)


def test_missing_compiler_is_an_error_that_names_the_package(
    testbed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = prepare_kernel(print, suite="")  # for those of another suite the compiler is fetched too
    headers = prepare_headers(kernel, print).folder
    monkeypatch.setenv("HYPERBELL_CACHE", str(tmp_path))
    (tmp_path / headers.parents[2].name).symlink_to(headers.parents[2])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match="install the Debian package 'make'"):
        prepare_module(kernel, print)


@pytest.fixture(scope="module")
def module_initramfs(testbed: Testbed) -> Path:
    """The guest tests' initramfs, with the module and a transport that is loaded later."""
    mmio = read_module(module_order(testbed.kernel.modules, ["virtio_mmio"])["virtio_mmio"])
    extra = {MODULE: prepare_module(testbed.kernel, print).read_bytes(), "/virtio_mmio.ko": mmio}
    return prepare_initramfs(testbed.kernel, print, extra=extra)


@pytest.fixture
async def site(folder: Path) -> Site:
    return Site(folder)


@pytest.fixture
async def guest(testbed: Testbed, module_initramfs: Path, site: Site) -> AsyncIterator[Guest]:
    async with site.serve(), testbed.boot(site.folder, SPLIT, initramfs=module_initramfs) as booted:
        yield booted


@pytest.fixture
async def checked_guest(testbed: Testbed, module_initramfs: Path, site: Site) -> AsyncIterator[Guest]:
    async with site.serve(), testbed.boot(site.folder, CHECKED, initramfs=module_initramfs) as booted:
        yield booted


async def no_complaint(guest: Guest) -> bool:
    """The kernel has nothing to say but that the module is not its own."""
    answer = await guest.run(
        "result tainted $(cat /proc/sys/kernel/tainted);"
        "dmesg | grep -E 'WARNING|BUG|Oops|Call Trace|general protection|stall' && echo FOUND; true"
    )
    assert "FOUND" not in answer.lines, answer.lines
    assert int(answer.results["tainted"]) & ~TAINT_ALLOWED == 0
    return True


async def test_guest_without_the_platform_leaf_keeps_its_plain_doorbells_and_says_why(guest: Guest, site: Site) -> None:
    await guest.run(f"insmod {MODULE} && {MOUNT_DEBUGFS}")
    facts = (
        await guest.run(
            f"for f in available reason hooks hypercall refused; do result $f $(cat {SYSFS}/$f); done;"
            "result log $(dmesg | grep -c 'hyperbell: hypercall doorbell not available: ')"
        )
    ).results
    assert facts["available"] == "0"
    assert facts["reason"] == "the hypervisor directly beneath shows no Hyper-V leaves"
    assert facts["hooks"] == "vp_notify vp_set_status"
    assert facts["log"] == "1"

    await guest.run(f"diskcheck w write /dev/vda 0 {MIB} 5 && diskcheck f flush /dev/vda")
    await guest.run(f"diskcheck v verify /dev/vda 0 {MIB} 5")
    await guest.run("dd if=/dev/vda of=/dev/null bs=4k count=200 iflag=direct")
    assert check_pattern(site.disk, 0, MIB, 5) == ""
    answer = await guest.run(
        f"result plain $(cat {SYSFS}/plain); result hypercall $(cat {SYSFS}/hypercall); cat {QUEUES}"
    )
    header, *rows = [line.split() for line in answer.lines if line and not line.startswith(("RESULT", "GUEST"))]
    assert header == ["device", "queue", "bell", "state", "hypercall", "plain", "refused", "rearm_ms"]
    queues = {(row[0], row[1]): row for row in rows}
    assert len(queues) == 4  # two of the disk, one of the frozen disk, one of the entropy source
    assert {row[3] for row in rows} == {"plain"}
    assert answer.results["hypercall"] == "0"
    kicks = sum(int(row[5]) for row in rows)
    assert kicks >= 10
    assert int(answer.results["plain"]) >= kicks
    assert await guest.run(f"echo 1 >{SYSFS}/rearm")
    assert (await guest.run(f"echo 0 >{SYSFS}/rearm", status=None)).status != 0
    assert await no_complaint(guest)


async def test_module_comes_and_goes_under_load_without_a_lost_request(guest: Guest, site: Site) -> None:
    span = "{} {}".format(*STRESSED)
    await guest.run(
        f"(while [ ! -e /tmp/enough ]; do diskcheck s stress /dev/vda {span} {STRESS_SEED} 2 16 300 >/tmp/said "
        "|| break; echo 1 >>/tmp/rounds; done; cat /tmp/said; echo LOAD ended) & true"
    )
    answer = await guest.run(
        f"n=0; while [ $n -lt {CYCLES} ] && insmod {MODULE} && cat {SYSFS}/plain >/dev/null && rmmod hyperbell;"
        "do n=$((n+1)); done; result cycles $n; result rounds $(wc -l </tmp/rounds); touch /tmp/enough",
        timeout_seconds=180,
    )
    assert answer.results["cycles"] == str(CYCLES)
    if not any(line.text.startswith("LOAD ended") for line in guest.console):
        await guest.expect("LOAD ended", 120)
    said = [line.text for line in guest.console]
    assert not [line for line in said if "s.error" in line], said[-20:]
    generations = int(results_of(said)["s.generations"])
    assert generations >= STRESSED[1] // BLOCK_SIZE
    assert sum_generations(site.disk, *STRESSED, STRESS_SEED) == generations
    assert await no_complaint(guest)


async def test_transport_is_hooked_when_it_is_loaded_later_and_let_go_when_it_leaves(checked_guest: Guest) -> None:
    await checked_guest.run(f"insmod {MODULE}")
    later = await checked_guest.run(f"insmod /virtio_mmio.ko && cat {SYSFS}/hooks")
    assert "vm_notify vm_set_status" in later.lines
    gone = await checked_guest.run(
        f"rmmod virtio_mmio && insmod /virtio_mmio.ko && rmmod virtio_mmio && cat {SYSFS}/hooks"
    )
    assert "vm_notify vm_set_status" not in gone.lines
    assert "vp_notify vp_set_status" in gone.lines
    await checked_guest.run(f"{VALIDATE_SLABS}; true")
    assert await no_complaint(checked_guest)


async def test_devices_that_leave_their_transport_and_come_back_are_met_again(checked_guest: Guest) -> None:
    """virtio-pci is unloaded; where it is built in, as in Debian 13's kernel, its devices are unbound."""
    await checked_guest.run(f"insmod {MODULE} && {MOUNT_DEBUGFS}")
    unloads = (await checked_guest.run("grep -q ^virtio_pci /proc/modules", status=None)).status == 0
    await checked_guest.run("rmmod virtio_pci" if unloads else ALL_PCI.format(action="unbind"))
    empty = await checked_guest.run(
        f"cat {SYSFS}/hooks; echo 1 >{SYSFS}/rearm; result queues $(grep -c virtio {QUEUES}); true"
    )
    assert ("vp_notify vp_set_status" in empty.lines) == (not unloads)
    assert empty.results["queues"] == "0"
    back = await checked_guest.run(
        f"{'insmod /modules/virtio_pci.ko' if unloads else ALL_PCI.format(action='bind')};"
        "for i in $(seq 500); do [ -b /dev/vda ] && [ -b /dev/vdb ] && break; usleep 20000; done;"
        f"cat {SYSFS}/hooks; dd if=/dev/vda of=/dev/null bs=4k count=10 iflag=direct || result failed read;"
        f"echo 1 >{SYSFS}/rearm; result queues $(grep -c virtio {QUEUES})"
    )
    assert "failed" not in back.results
    assert "vp_notify vp_set_status" in back.lines
    assert back.results["queues"] == "4"
    await checked_guest.run(f"{VALIDATE_SLABS}; true")
    assert await no_complaint(checked_guest)
