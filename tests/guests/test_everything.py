"""One daemon serves one Linux guest with a device of every kind at once, and a second guest that it talks to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from guests.iperf import tcp_goes_both_ways
from guests.simulated import LINES, PINS_AND_BUS, kernel_and_drivers, lines_are_driven_and_read
from guests.testbed import MIB, Testbed
from guests.vsock_conversations import guest_to_guest, guest_to_host, host_to_guest
from guests.web import PAGE, web_server
from kit.host.line_client import talking

from guest.boot.initramfs import compiled_program, prepare_initramfs, program_files
from guest.boot.machine import Guest, Machine
from guest.boot.pattern import check_pattern
from guest.boot.service import Daemon, free_port, qemu_arguments, serve

pytestmark = pytest.mark.guest

MEMORY_MIB = 256
NETWORK_AND_SOCKETS = ("virtio_pci", "virtio_net", "vmw_vsock_virtio_transport")
MODULES = (*NETWORK_AND_SOCKETS, "virtio_blk", "virtio-rng", "i2c-dev")
SEED = 11
WRITTEN = 4 * MIB
SENT = 16 * MIB

# An input device is missing: QEMU 7.2 attaches one only to guests that run with KVM (see tests/nested/test_pins.py).
ANN = ("disk", "entropy", "dice", "pins", "bus", "ann-lan", "ann-vsock", "outside")
BOB = ("bob-lan", "bob-vsock")
# In the order in which the guests find them: eth0 is the switch, eth1 the outside.
CONFIG = (
    """
[daemon]
metrics = "127.0.0.1:PORT"

[devices.disk]
type = "blk"
path = "disk.img"
socket = "disk.sock"

[devices.entropy]
type = "rng"
socket = "entropy.sock"

[devices.dice]
type = "./dice.py:Dice"
socket = "dice.sock"
"""
    + PINS_AND_BUS
    + "".join(
        f"""
[devices.{name}-lan]
type = "net"
backend = "switch"
switch = "lan"
socket = "{name}-lan.sock"

[devices.{name}-vsock]
type = "vsock"
socket = "{name}-vsock.sock"
cid = {cid}
path = "{name}.vsock"
group = "lab"
"""
        for name, cid in (("ann", 3), ("bob", 4))
    )
    + """
[devices.outside]
type = "net"
backend = "user"
host_loopback = true
socket = "outside.sock"
"""
)
DICE = '''
import random

from virtio import Chain, Device, GuestError, Queue


class Dice(Device):
    """An entropy device (virtio 1.3, section 5.4) whose bytes are throws."""

    virtio_id = 4
    type_name = "dice"
    ops = ("throw",)

    async def handle(self, queue: Queue, chain: Chain) -> None:
        if chain.readable_length:
            raise GuestError("a driver of entropy devices sends nothing (5.4.6.1)")
        chain.write(bytes(random.randint(1, 6) for _ in range(min(chain.writable_length, 64))))
'''
LEASE = b"""#!/bin/sh
[ "$1" != bound ] || ip addr add "$ip/$mask" dev "$interface"
"""


@pytest.fixture
async def world(testbed: Testbed, folder: Path) -> AsyncIterator[tuple[Daemon, Guest, Guest]]:
    """The daemon, the guest that has everything, and the other one."""
    kernel, drivers = kernel_and_drivers()
    programs = {
        "/bin/vsockcat": compiled_program("vsockcat", ["vsockcat.c"], print),
        **program_files("iperf3", "iperf3"),
    }
    everything = {**programs, "/bin/lease": LEASE, **{f"/{name}.ko": module for name, module in drivers.items()}}
    config, port = folder / "everything.toml", free_port()
    config.write_text(CONFIG.replace("PORT", str(port)))
    (folder / "dice.py").write_text(DICE)
    (folder / "disk.img").touch()
    os.truncate(folder / "disk.img", 64 * MIB)
    ann_root = prepare_initramfs(kernel, print, MODULES, everything)
    bob_root = prepare_initramfs(testbed.kernel, print, NETWORK_AND_SOCKETS, programs)
    async with serve(config, folder, port) as daemon:
        ann_machine = Machine(
            kernel.image, ann_root, await qemu_arguments(config, MEMORY_MIB, ANN), memory_mib=MEMORY_MIB
        )
        bob_machine = Machine(
            testbed.kernel.image, bob_root, await qemu_arguments(config, MEMORY_MIB, BOB), memory_mib=MEMORY_MIB
        )
        async with testbed.hypervisor.boot(ann_machine) as ann, testbed.hypervisor.boot(bob_machine) as bob:
            await ann.run(" && ".join(f"insmod /{name}.ko" for name in drivers))
            yield daemon, ann, bob
            await ann.power_off()
            await bob.power_off()
            await daemon.stop()


async def test_a_guest_uses_devices_of_every_kind_that_one_daemon_serves_at_once(
    world: tuple[Daemon, Guest, Guest], folder: Path
) -> None:
    daemon, ann, bob = world
    await disk_keeps_what_is_written(ann, folder)
    await random_bytes_and_throws_come(ann)
    await guests_meet_on_the_switch(ann, bob)
    await file_comes_from_the_host(ann, folder)
    await guest_to_host(ann, folder)
    await host_to_guest(ann, folder)
    await guest_to_guest(ann, bob)
    await lines_are_driven_and_watched(ann, folder)
    await chips_are_found_and_read(ann, folder)
    await nothing_broke(daemon)


async def disk_keeps_what_is_written(ann: Guest, folder: Path) -> None:
    span = f"/dev/vda 0 {WRITTEN} {SEED}"
    await ann.run(f"diskcheck write write {span} && diskcheck flush flush /dev/vda && diskcheck verify verify {span}")
    assert check_pattern(folder / "disk.img", 0, WRITTEN, SEED) == ""


async def random_bytes_and_throws_come(ann: Guest) -> None:
    """Of two sources of entropy, the guest's kernel uses the one it is told; what it has of the other goes first."""
    source = "/sys/class/misc/hw_random/rng_current"
    drawn: dict[int, set[int]] = {}
    for number in (0, 1):
        await ann.run(f"echo virtio_rng.{number} >{source} && head -c 512 /dev/hwrng >/dev/null")
        answer = await ann.run("head -c 256 /dev/hwrng | hexdump -v -e '1/1 \"%u \"'")
        drawn[number] = {int(word) for word in " ".join(answer.lines).split()}
    assert len(drawn[0]) > 100
    assert drawn[1] == set(range(1, 7))


async def guests_meet_on_the_switch(ann: Guest, bob: Guest) -> None:
    for guest, address in ((ann, "10.9.0.1"), (bob, "10.9.0.2")):
        await guest.run(f"ip link set lo up; ip link set eth0 up && ip addr add {address}/24 dev eth0")
    pinged = await ann.run("ping -c 3 -W 5 10.9.0.2")
    assert "3 packets received" in "\n".join(pinged.lines)
    await tcp_goes_both_ways(ann, bob, "10.9.0.2", SENT)


async def file_comes_from_the_host(ann: Guest, folder: Path) -> None:
    """By an address from DHCP, and from a server on the host's own 127.0.0.1."""
    (folder / "web").mkdir()
    (folder / "web" / "page").write_bytes(PAGE)
    await ann.run("ip link set eth1 up && udhcpc -i eth1 -n -q -s /bin/lease")
    with web_server(folder / "web") as port:
        await ann.run(f"wget -q -O /tmp/page http://10.0.2.2:{port}/page", timeout_seconds=60)
    answer = await ann.run("result page $(sha256sum </tmp/page); result address $(ip -4 addr show dev eth1)")
    assert answer.results["page"].split() == [hashlib.sha256(PAGE).hexdigest(), "-"]
    assert "10.0.2.15/24" in answer.results["address"]


async def lines_are_driven_and_watched(ann: Guest, folder: Path) -> None:
    async with talking(folder / "pins.control") as pins, talking(folder / "pins.control") as watcher:
        assert await watcher.command("watch") == ["ok"]
        await lines_are_driven_and_read(ann)
        while await watcher.line() != "line 1 output 1 none led":
            pass
        assert await pins.command("set button 1") == ["ok"]
        answer = await ann.run(f"result button $(cat {LINES}/button/value); echo 0 >{LINES}/led/value")
        assert answer.results["button"] == "1"
        while await watcher.line() != "line 1 output 0 none led":
            pass


async def chips_are_found_and_read(ann: Guest, folder: Path) -> None:
    """The sensor at 0x48 and the memory at 0x50, and nobody else."""
    answer = await ann.run("result found $(i2cdetect -y -r 0 | tail -n +2 | cut -d : -f 2 | grep -o -E '[0-9a-f]{2}')")
    assert answer.results["found"] == "48 50"
    answer = await ann.run(
        "i2cset -y 0 0x50 3 0x5a b && result byte $(i2cget -y 0 0x50 3 b) && result word $(i2cget -y 0 0x48 0 w)"
    )
    assert answer.results == {"byte": "0x5a", "word": "0x0019"}  # the sensor's high byte comes first
    async with talking(folder / "bus.control") as bus:
        assert await bus.command("get 0x50 3") == ["value 0x50 0x03 0x5a", "ok"]


async def nothing_broke(daemon: Daemon) -> None:
    """Every device answered, and nobody was at fault. Who is looked for on the bus and not there is an error."""
    metrics = await daemon.metrics()
    assert metrics.select("hyperbell_queue_broken")
    assert metrics.total("hyperbell_queue_broken") == 0
    assert metrics.total("hyperbell_protocol_errors_total") == 0
    requests = metrics.by("device", "hyperbell_requests_total")
    errors = metrics.by("device", "hyperbell_request_errors_total")
    for device in (*ANN, *BOB):
        assert metrics.total("hyperbell_frontend_connected", device=device) == 1, device
        assert requests[device] > 0, device
        assert device == "bus" or errors[device] == 0, device
