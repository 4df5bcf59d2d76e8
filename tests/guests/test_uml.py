"""User-mode Linux as the front-end: a real kernel uses devices with default keys, and drivers come and go."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import pytest
import trio
from guests.uses import FOUR_DEVICES, FOUR_TYPES, LEASE, disk_keeps, page_comes_from_the_host, terminal_speaks_both_ways
from guests.vsock_conversations import MIB, guest_to_host, host_to_guest
from kit.front_end.message_relay import notifies, relay

from guest.boot.initramfs import compiled_program, prepare_initramfs
from guest.boot.service import Daemon, free_port, hyperbell_command, serve
from guest.boot.uml import UmlDevice, UmlGuest, boot_command, boot_uml, linux_command
from guest.debian.kernel import Kernel

pytestmark = pytest.mark.guest

MODULES = ("virtio_blk", "virtio_net", "virtio_console", "vmw_vsock_virtio_transport")
DRIVERS = "/sys/bus/virtio/drivers"


class House:
    """A daemon's folder and configuration, and the guest that its devices are for."""

    def __init__(self, folder: Path, kernel: Kernel, keys: str = "") -> None:
        """``keys`` of each device, beside those of ``FOUR_DEVICES``."""
        self.folder = folder
        self.kernel = kernel
        program = compiled_program("vsockcat", ["vsockcat.c"], print)
        extra = {"/bin/vsockcat": program, "/bin/lease": LEASE}
        self.initramfs = prepare_initramfs(kernel, print, MODULES, extra)
        self.port = free_port()
        self.config = folder / "uml.toml"
        text = re.sub(r"^socket = .*\n", rf"\g<0>{keys}", FOUR_DEVICES, flags=re.MULTILINE)
        self.config.write_text(text.replace("PORT", str(self.port)))
        self.image = folder / "disk.img"
        self.image.touch()
        os.truncate(self.image, 64 * MIB)

    def serve(self) -> AbstractAsyncContextManager[Daemon]:
        return serve(self.config, self.folder, self.port)

    def boot(self, *names: str, ending: str = "sock") -> AbstractAsyncContextManager[UmlGuest]:
        """With the devices ``names``, or all, at their sockets, which are called NAME.``ending``."""
        devices = [UmlDevice(self.folder / f"{name}.{ending}", FOUR_TYPES[name]) for name in names or FOUR_TYPES]
        return boot_uml(self.kernel, self.initramfs, devices)


@pytest.fixture
def house(uml: Kernel, folder: Path) -> House:
    return House(folder, uml)


@pytest.mark.parametrize("inband", [False, True], ids=["descriptors", "inband"])
async def test_a_real_kernel_uses_each_device_with_default_keys_and_by_messages_where_they_are_offered(
    uml: Kernel, folder: Path, inband: bool
) -> None:
    """What it kicks with and is called by is seen on the way: eventfds and stream sockets, or messages alone."""
    house = House(folder, uml, "inband_notifications = true\n" if inband else "")
    async with house.serve() as daemon, AsyncExitStack() as stack:
        relays = {
            name: await stack.enter_async_context(relay(folder / f"{name}.relay", folder / f"{name}.sock"))
            for name in FOUR_TYPES
        }
        async with house.boot(ending="relay") as guest:
            await disk_keeps(guest, "vda", house.image, 1)
            await page_comes_from_the_host(guest, house.folder)
            await guest_to_host(guest, house.folder)
            await host_to_guest(guest, house.folder)
            await terminal_speaks_both_ways(guest, house.folder)
            await nothing_broke(daemon)
            for name, each in relays.items():
                assert notifies(each.said) == ({"VRING_KICK"} if inband else {"kick fd", "call fd"}), name
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
        await disk_keeps(guest, "vda", house.image, 1)
        await page_comes_from_the_host(guest, house.folder)
        await guest_to_host(guest, house.folder)
        await terminal_speaks_both_ways(guest, house.folder)
        await nothing_broke(daemon)
        await guest.power_off()


@pytest.mark.parametrize("reactor", ["io_uring", "epoll"])
async def test_a_driver_that_is_unbound_and_bound_again_finds_its_device_as_it_was(house: House, reactor: str) -> None:
    """It disables its rings, never stops them, and gives a base to rings that were started."""
    house.config.write_text(f'{house.config.read_text()}\n[workers.default]\nreactor = "{reactor}"\n')
    async with house.serve() as daemon, house.boot() as guest:
        for turn in (1, 2, 3):
            await disk_keeps(guest, "vda", house.image, turn)
            await terminal_speaks_both_ways(guest, house.folder)
            for driver in ("virtio_blk", "virtio_net", "virtio_console"):
                await guest.run(
                    f"cd {DRIVERS}/{driver} && it=$(echo virtio*) && echo $it >unbind && echo $it >bind && cd /"
                )
            await guest.run(f"diskcheck again verify /dev/vda 0 {4 * MIB} {turn}")
            await page_comes_from_the_host(guest, house.folder)
        await nothing_broke(daemon)
        await guest.power_off()


async def test_a_guest_that_was_powered_off_leaves_its_devices_to_the_next(house: House) -> None:
    async with house.serve() as daemon:
        for turn in (1, 2):
            async with house.boot() as guest:
                if turn == 2:
                    await guest.run(f"diskcheck first verify /dev/vda 0 {4 * MIB} 1")
                await disk_keeps(guest, "vda", house.image, turn)
                await guest.power_off()
        await nothing_broke(daemon)


async def test_a_daemon_that_was_restarted_serves_the_next_guest_while_the_first_has_lost_its_disk_and_goes_on(
    house: House,
) -> None:
    """User-mode Linux does not connect again: it takes a device away whose back-end has gone."""
    async with house.serve() as first, house.boot("disk") as guest:
        await disk_keeps(guest, "vda", house.image, 1)
        await first.stop()
        async with house.serve() as second, house.boot("disk") as other:
            await other.run(f"diskcheck first verify /dev/vda 0 {4 * MIB} 1")
            await disk_keeps(other, "vda", house.image, 2)
            await guest.run("until [ ! -e /dev/vda ]; do usleep 10000; done")
            await nothing_broke(second)
            await other.power_off()
        await guest.power_off()


async def nothing_broke(daemon: Daemon) -> None:
    metrics = await daemon.metrics()
    assert metrics.select("hyperbell_queue_broken")
    for name in ("hyperbell_queue_broken", "hyperbell_protocol_errors_total", "hyperbell_request_errors_total"):
        assert metrics.total(name) == 0, name
