"""User-mode Linux as the front-end: a real kernel uses devices with default keys, and drivers come and go."""

from __future__ import annotations

import hashlib
import os
import shlex
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from guests.vsock_conversations import MIB, guest_to_host, host_to_guest
from guests.web import PAGE, web_server

from guest.console import Console
from guest.initramfs import compiled_program, prepare_initramfs
from guest.kernel import Kernel
from guest.pattern import check_pattern
from guest.service import Daemon, free_port, hyperbell_command, serve
from guest.uml import UmlDevice, UmlGuest, boot_command, boot_uml, linux_command

pytestmark = pytest.mark.guest

MODULES = ("virtio_blk", "virtio_net", "virtio_console", "vmw_vsock_virtio_transport")
DRIVERS = "/sys/bus/virtio/drivers"
DEVICES = {"disk": 2, "outside": 1, "ann": 19, "terminal": 3}
LEASE = b"""#!/bin/sh
[ "$1" != bound ] || ip addr add "$ip/$mask" dev "$interface"
"""
CONFIG = """
[daemon]
metrics = "127.0.0.1:PORT"

[devices.disk]
type = "blk"
path = "disk.img"
socket = "disk.sock"

[devices.outside]
type = "net"
backend = "user"
host_loopback = true
socket = "outside.sock"

[devices.ann]
type = "vsock"
cid = 3
path = "ann.vsock"
socket = "ann.sock"

[devices.terminal]
type = "console"
backend = "socket"
path = "terminal"
socket = "terminal.sock"
"""


class House:
    """A daemon's folder and configuration, and the guest that its devices are for."""

    def __init__(self, folder: Path, kernel: Kernel) -> None:
        self.folder = folder
        self.kernel = kernel
        program = compiled_program("vsockcat", ["vsockcat.c"], print)
        extra = {"/bin/vsockcat": program, "/bin/lease": LEASE}
        self.initramfs = prepare_initramfs(kernel, print, MODULES, extra)
        self.port = free_port()
        self.config = folder / "uml.toml"
        self.config.write_text(CONFIG.replace("PORT", str(self.port)))
        self.image = folder / "disk.img"
        self.image.touch()
        os.truncate(self.image, 64 * MIB)
        (folder / "web").mkdir()
        (folder / "web" / "page").write_bytes(PAGE)

    def serve(self) -> AbstractAsyncContextManager[Daemon]:
        return serve(self.config, self.folder, self.port)

    def boot(self, *names: str) -> AbstractAsyncContextManager[UmlGuest]:
        devices = [UmlDevice(self.folder / f"{name}.sock", DEVICES[name]) for name in names or DEVICES]
        return boot_uml(self.kernel, self.initramfs, devices)


@pytest.fixture
def house(uml: Kernel, folder: Path) -> House:
    return House(folder, uml)


async def disk_keeps(guest: Console, house: House, seed: int) -> None:
    span = f"/dev/vda 0 {4 * MIB} {seed}"
    await guest.run(f"diskcheck w write {span} && diskcheck f flush /dev/vda && diskcheck v verify {span}")
    assert check_pattern(house.image, 0, 4 * MIB, seed) == ""


async def page_comes_from_the_host(guest: Console, house: House) -> None:
    """By an address from DHCP, and from a server on the host's own 127.0.0.1."""
    await guest.run("ip link set eth0 up && udhcpc -i eth0 -n -q -s /bin/lease && ping -c 2 -W 5 10.0.2.2")
    with web_server(house.folder / "web") as port:
        await guest.run(f"wget -q -O /tmp/page http://10.0.2.2:{port}/page", timeout_seconds=60)
    answer = await guest.run("result page $(sha256sum </tmp/page)")
    assert answer.results["page"].split()[0] == hashlib.sha256(PAGE).hexdigest()


async def terminal_speaks_both_ways(guest: Console, house: House) -> None:
    async with await trio.open_unix_socket(house.folder / "terminal") as host:
        await guest.run("exec 3<>/dev/hvc0; stty raw -echo <&3; head -n 1 <&3 >/tmp/typed & echo ready >&3")
        assert await host.receive_some() == b"ready\n"
        await host.send_all(b"hello, guest\n")
        assert (await guest.run("wait $!; exec 3<&-; cat /tmp/typed")).lines == ["hello, guest"]


async def test_a_real_kernel_uses_each_device_with_default_keys(house: House) -> None:
    async with house.serve() as daemon, house.boot() as guest:
        await disk_keeps(guest, house, 1)
        await page_comes_from_the_host(guest, house)
        await guest_to_host(guest, house.folder)
        await host_to_guest(guest, house.folder)
        await terminal_speaks_both_ways(guest, house)
        await nothing_broke(daemon)
        await guest.power_off()


@pytest.mark.parametrize("printed", [False, True], ids=["run", "printed"])
async def test_hyperbell_uml_boots_a_guest_with_every_device_of_the_file(house: House, printed: bool) -> None:
    """What it becomes, and the command line that it prints."""
    command = [str(hyperbell_command()), "uml", str(house.config), "--memory", "96M"]
    linux = linux_command(house.kernel, house.initramfs, house.folder)
    if printed:
        told = await trio.run_process([*command, "--print", "--", *linux], capture_stdout=True)
        command = shlex.split(told.stdout.decode())
    else:
        command += ["--", *linux]
    async with house.serve() as daemon, boot_command(command) as guest:
        kib = int((await guest.run("result kib $(awk '/MemTotal/ {print $2}' /proc/meminfo)")).results["kib"])
        assert 64 * 1024 < kib < 96 * 1024
        await disk_keeps(guest, house, 1)
        await page_comes_from_the_host(guest, house)
        await guest_to_host(guest, house.folder)
        await terminal_speaks_both_ways(guest, house)
        await nothing_broke(daemon)
        await guest.power_off()


async def test_a_driver_that_is_unbound_and_bound_again_finds_its_device_as_it_was(house: House) -> None:
    """It disables its rings, never stops them, and gives a base to rings that were started."""
    async with house.serve() as daemon, house.boot() as guest:
        for turn in (1, 2, 3):
            await disk_keeps(guest, house, turn)
            await terminal_speaks_both_ways(guest, house)
            for driver in ("virtio_blk", "virtio_net", "virtio_console"):
                await guest.run(
                    f"cd {DRIVERS}/{driver} && it=$(echo virtio*) && echo $it >unbind && echo $it >bind && cd /"
                )
            await guest.run(f"diskcheck again verify /dev/vda 0 {4 * MIB} {turn}")
            await page_comes_from_the_host(guest, house)
        await nothing_broke(daemon)
        await guest.power_off()


async def test_a_guest_that_was_powered_off_leaves_its_devices_to_the_next(house: House) -> None:
    async with house.serve() as daemon:
        for turn in (1, 2):
            async with house.boot() as guest:
                if turn == 2:
                    await guest.run(f"diskcheck first verify /dev/vda 0 {4 * MIB} 1")
                await disk_keeps(guest, house, turn)
                await guest.power_off()
        await nothing_broke(daemon)


async def test_a_daemon_that_was_restarted_serves_the_next_guest_while_the_first_has_lost_its_disk_and_goes_on(
    house: House,
) -> None:
    """User-mode Linux does not connect again: it takes a device away whose back-end has gone."""
    async with house.serve() as first, house.boot("disk") as guest:
        await disk_keeps(guest, house, 1)
        await first.stop()
        async with house.serve() as second, house.boot("disk") as other:
            await other.run(f"diskcheck first verify /dev/vda 0 {4 * MIB} 1")
            await disk_keeps(other, house, 2)
            await guest.run("until [ ! -e /dev/vda ]; do usleep 10000; done")
            await nothing_broke(second)
            await other.power_off()
        await guest.power_off()


async def nothing_broke(daemon: Daemon) -> None:
    metrics = await daemon.metrics()
    assert metrics.select("hyperbell_queue_broken")
    for name in ("hyperbell_queue_broken", "hyperbell_protocol_errors_total", "hyperbell_request_errors_total"):
        assert metrics.total(name) == 0, name
