"""Stock QEMU whose monitor loads a snapshot that another QEMU saved: the guest in it may remember that one's key.

The guest is a ROM of a few instructions that writes GUEST_OS_ID, as a driver does that rings by hypercall, and halts.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from nested.doorbell_guest import HYPERCALL_SOCKET, HYPERV_CPU, serve_disks, shown
from nested.qmp import prepare_qmp, qmp

from guest.nested.level import Level

ROM = "/tmp/writes-os-id.rom"
DISK = "/tmp/snapshots.qcow2"
MONITOR = "/run/snapshots-qmp.sock"
SAID = "/tmp/snapshots.said"
CLUSTER = 1 << 16
GUARD = 240.0  # seconds; only a failing run gets there
RESET = {"execute": "system_reset"}
QUIT = {"execute": "quit"}


def rom() -> bytes:
    code = bytes.fromhex(
        "66b900000040"  # mov ecx, HV_X64_MSR_GUEST_OS_ID
        "66b801000000"  # mov eax, 1
        "6631d2"  # xor edx, edx
        "0f30"  # wrmsr
        "b078e6e9"  # out 0xe9, 'x'
        "f4ebfd"  # hlt, again and again
    )
    return code.ljust(0xFFF0, b"\xf4") + bytes.fromhex("ea000000f0").ljust(16, b"\xf4")  # from the reset vector to it


def empty_qcow2() -> bytes:
    """A disk of 1 MiB that holds nothing yet: header, table and block of reference counts, L1 table."""
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, 1 << 20, 0, 1, 3 * CLUSTER, CLUSTER, 1, 0, 0)
    counts = struct.pack(">Q", 2 * CLUSTER), struct.pack(">4H", 1, 1, 1, 1)
    return b"".join(part.ljust(CLUSTER, b"\0") for part in (header, *counts, b""))


def in_monitor(line: str) -> dict[str, Any]:
    """A command of the monitor for people, which answers nothing when it succeeds."""
    return {"execute": "human-monitor-command", "arguments": {"command-line": line}}


@asynccontextmanager
async def qemu(host: Level, name: str, key: str = "") -> AsyncIterator[None]:
    """From the moment its guest has written the register; it is told to quit at the end."""
    machine = (
        f"qemu-system-x86_64 -nodefaults -no-user-config -display none -accel kvm -M pc -m 16M -cpu {HYPERV_CPU}"
        f" -bios {ROM} -debugcon file:{SAID} -drive if=none,id=state,file={DISK},format=qcow2"
        f" -qmp unix:{MONITOR},server=on,wait=off"
    )
    await host.run(f"rm -f {SAID} {MONITOR}")
    async with host.job(name, f"hyperbell qemu --socket {HYPERCALL_SOCKET} --name {name} {key} -- {machine}") as job:
        await host.run(
            f"until grep -q x {SAID} 2>/dev/null;"
            f" do kill -0 {job.pid} || {{ cat {job.log_path}; break; }}; usleep 50000; done; kill -0 {job.pid}",
            timeout_seconds=120,
        )
        yield
        await qmp(host, MONITOR, QUIT)
        assert await job.wait() == 0, await job.log()


async def when_shown(host: Level) -> dict[str, Any]:
    """The VM, once it is known that its guest sees the key."""
    vm = await shown(host)
    while not vm["key_shown"] and not vm["reason"]:
        vm = await shown(host)
    return vm


@pytest.mark.nested_full
@pytest.mark.parametrize("key", ["", "--key 5a17c3"], ids=["drawn", "given"])
async def test_a_snapshot_that_the_monitor_loads_leaves_the_doorbell_only_to_a_key_that_was_given(
    host: Level, key: str
) -> None:
    await prepare_qmp(host)
    await host.write(ROM, rom())
    await host.write(DISK, empty_qcow2())
    name = "given" if key else "drawn"
    async with serve_disks(host, ["disk"]) as daemon:
        async with qemu(host, f"{name}-saves", key):
            assert await qmp(host, MONITOR, in_monitor("savevm state")) == ""
        async with qemu(host, f"{name}-loads", key):
            await qmp(host, MONITOR, RESET)  # QEMU writes the register then too
            vm = await when_shown(host)
            assert (vm["name"], vm["key_shown"], vm["reason"]) == (f"{name}-loads", True, "")
            assert await qmp(host, MONITOR, in_monitor("loadvm state")) == ""
            vm = await shown(host)
            with trio.fail_after(GUARD):
                while not key and vm["key_shown"]:  # the library's message is under way
                    vm = await shown(host)
            assert vm["key_shown"] == bool(key)
            assert ("needs the key it had there" in vm["reason"]) == (not key)
        await daemon.stop()
