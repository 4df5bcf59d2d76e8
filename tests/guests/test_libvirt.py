"""A domain that a real libvirtd starts, from the XML that we print: every type of device works in it.

Part of ``make test-ground``: libvirt and its QEMU are those of Debian's backports, fetched and not installed.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
import trio
from guests.libvirt_host import CONNECT_SECONDS, DomainConsole, Libvirt, libvirt_host, libvirt_tree
from guests.simulated import (
    KEYBOARD_LABEL,
    PINS_AND_BUS,
    kernel_and_drivers,
    keys_arrive_and_a_light_is_told,
    lines_are_driven_and_read,
)
from guests.uses import (
    LEASE,
    SIXES,
    chips_are_found,
    disk_keeps,
    page_comes_from_the_host,
    random_bytes_and_sixes_come,
    terminal_speaks_both_ways,
)
from guests.vsock_conversations import MIB, guest_to_host, host_to_guest
from kit.host.line_client import talking

from guest.boot.initramfs import compiled_program, prepare_initramfs
from guest.boot.service import Daemon, free_port, hyperbell_command, serve
from guest.debian.suites import open_suite

pytestmark = pytest.mark.ground

SUITE = "trixie-backports"
NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport", "virtio-rng", "virtio_console"),
    *("virtio_input", "evdev", "i2c-dev"),
)
BOOT_SECONDS = 120.0
CONFIG = f"""
[daemon]
metrics = "127.0.0.1:PORT"

[devices.disk]
type = "blk"
path = "disk.img"
socket = "disk.sock"
queues = 2

[devices.second]
type = "blk"
path = "second.img"
socket = "second.sock"

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

[devices.entropy]
type = "rng"
socket = "entropy.sock"

[devices.terminal]
type = "console"
backend = "socket"
path = "terminal"
socket = "terminal.sock"

[devices.keyboard]
type = "input"
socket = "keyboard.sock"
label = "{KEYBOARD_LABEL}"
control = "keyboard.control"

[devices.sixes]
type = "./sixes.py:Sixes"
socket = "sixes.sock"
{PINS_AND_BUS}"""
DEVICES = ("disk", "second", "outside", "ann", "entropy", "terminal", "keyboard", "sixes", "pins", "bus")


async def domain(config: Path, qemu: str, kernel: Path, initramfs: Path, console: Path) -> str:
    """The printed XML, with what a domain needs beside its devices: a name, a kernel, a processor, a console."""
    command = [str(hyperbell_command()), "qemu-args", str(config), "--libvirt", "--accel", "tcg", "--memory", "256M"]
    printed = (await trio.run_process([*command, "--qemu", qemu], capture_stdout=True)).stdout
    ElementTree.register_namespace("qemu", NAMESPACE)
    root = ElementTree.fromstring(printed)
    ElementTree.SubElement(root, "name").text = "ann"
    ElementTree.SubElement(root, "vcpu").text = "1"
    ElementTree.SubElement(root, "cpu", {"mode": "maximum"})
    system = ElementTree.SubElement(root, "os")
    ElementTree.SubElement(system, "type", {"arch": "x86_64", "machine": "q35"}).text = "hvm"
    for name, text in (("kernel", kernel), ("initrd", initramfs), ("cmdline", "console=ttyS0 quiet panic=-1")):
        ElementTree.SubElement(system, name).text = str(text)
    features = ElementTree.SubElement(root, "features")
    ElementTree.SubElement(features, "acpi")
    devices = root.find("devices")
    assert devices is not None
    serial = ElementTree.SubElement(devices, "serial", {"type": "unix"})
    ElementTree.SubElement(serial, "source", {"mode": "connect", "path": str(console)})
    return ElementTree.tostring(root, encoding="unicode")


async def test_a_domain_that_libvirt_starts_from_what_we_print_uses_a_device_of_every_type(folder: Path) -> None:
    tree = libvirt_tree(open_suite(SUITE, print))
    kernel, drivers = kernel_and_drivers()
    extra = {"/bin/vsockcat": compiled_program("vsockcat", ["vsockcat.c"], print), "/bin/lease": LEASE}
    initramfs = prepare_initramfs(
        kernel, print, MODULES, {**extra, **{f"/{name}.ko": module for name, module in drivers.items()}}
    )
    # libvirtd sees the folder alone.
    (folder / "vmlinux").write_bytes(kernel.image.read_bytes())
    (folder / "initrd").write_bytes(initramfs.read_bytes())
    for name in ("disk.img", "second.img"):
        (folder / name).touch()
        os.truncate(folder / name, 64 * MIB)
    (folder / "sixes.py").write_text(SIXES)
    port, config, console = free_port(), folder / "libvirt.toml", folder / "console"
    config.write_text(CONFIG.replace("PORT", str(port)))
    raw = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await raw.bind(str(console))
    raw.listen(1)
    async with (
        trio.SocketListener(raw) as listener,
        serve(config, folder, port) as daemon,
        libvirt_host(tree, folder) as libvirt,
    ):
        said = await libvirt.virsh("version")
        version = re.search(r"Running hypervisor: QEMU (\S+)", said)
        assert version, said
        xml = folder / "domain.xml"
        xml.write_text(await domain(config, version.group(1), folder / "vmlinux", folder / "initrd", console))
        async with started(libvirt, xml, listener) as guest:
            await guest.run(" && ".join(f"insmod /{name}.ko" for name in drivers))
            await disk_keeps(guest, "vda", folder / "disk.img", 1)
            await disk_keeps(guest, "vdb", folder / "second.img", 2)
            await random_bytes_and_sixes_come(guest)
            await page_comes_from_the_host(guest, folder)
            await guest_to_host(guest, folder)
            await host_to_guest(guest, folder)
            await terminal_speaks_both_ways(guest, folder)
            await lines_are_driven_and_read(guest)
            await chips_are_found(guest)
            async with talking(folder / "keyboard.control") as keys:
                await keys_arrive_and_a_light_is_told(guest, keys)
            await nothing_broke(daemon)
            assert (await libvirt.virsh("list", "--name")).split() == ["ann"]
            await guest.until_off()
        await daemon.stop()


@asynccontextmanager
async def started(libvirt: Libvirt, xml: Path, listener: trio.SocketListener) -> AsyncIterator[DomainConsole]:
    """The domain of ``xml``, booted; its serial port connects to ``listener``."""
    await libvirt.virsh("create", "--validate", str(xml), timeout_seconds=CONNECT_SECONDS)
    with trio.fail_after(CONNECT_SECONDS):
        stream = await listener.accept()
    async with stream:
        guest = DomainConsole(stream)
        await guest.expect_userspace(BOOT_SECONDS)
        await guest.expect_ready()
        yield guest


async def nothing_broke(daemon: Daemon) -> None:
    metrics = await daemon.metrics()
    for name in ("hyperbell_queue_broken", "hyperbell_protocol_errors_total"):
        assert metrics.total(name) == 0, name
    requests = metrics.by("device", "hyperbell_requests_total")
    errors = metrics.by("device", "hyperbell_request_errors_total")
    for device in DEVICES:
        assert metrics.total("hyperbell_frontend_connected", device=device) == 1, device
        assert requests[device] > 0, device
        assert device == "bus" or errors[device] == 0, device  # who is looked for and not there is an error
