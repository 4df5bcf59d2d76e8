"""Two real Linux guests on one switch: they reach each other, and TCP with all its offloads arrives whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from guests.testbed import Testbed

from guest.initramfs import prepare_initramfs, program_files
from guest.machine import Guest, Machine, shared_memory
from guest.service import Daemon, free_port, serve

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
NAMES = ("ann", "bob")
ADDRESSES = {"ann": "10.9.0.1", "bob": "10.9.0.2"}
MACS = {"ann": "52:54:00:00:00:0a", "bob": "52:54:00:00:00:0b"}
SENT = 64 * MIB
FILE = 8 * MIB
CONFIG = "\n".join(
    f"""
[devices.{name}]
type = "net"
backend = "switch"
switch = "lan"
socket = "{name}.sock"
"""
    for name in NAMES
)


async def up(guest: Guest, name: str) -> None:
    await guest.run(f"ip link set lo up; ip link set eth0 up && ip addr add {ADDRESSES[name]}/24 dev eth0")


def machine(testbed: Testbed, initramfs: Path, folder: Path, name: str) -> Machine:
    devices = [
        *shared_memory(256),
        *("-chardev", f"socket,id=net,path={folder / name}.sock", "-netdev", "vhost-user,id=net0,chardev=net"),
        # Without MSI-X: under TCG, QEMU 7.2 follows a null pointer when the guest unmasks a vector of a vhost-user
        # network interface (it wants KVM's irqfd, which there is none of).
        *("-device", f"virtio-net-pci,netdev=net0,mac={MACS[name]},disable-legacy=on,vectors=0"),
    ]
    return Machine(testbed.kernel.image, initramfs, devices)


@pytest.fixture
async def pair(testbed: Testbed, folder: Path) -> AsyncIterator[tuple[Daemon, Guest, Guest]]:
    """The daemon, and the two guests with their interfaces up."""
    initramfs = prepare_initramfs(
        testbed.kernel, print, ("virtio_pci", "virtio_net"), program_files("iperf3", "iperf3")
    )
    port = free_port()
    config = folder / "net.toml"
    config.write_text(f'[daemon]\nmetrics = "127.0.0.1:{port}"\n{CONFIG}')
    async with (
        serve(config, folder, port) as daemon,
        testbed.hypervisor.boot(machine(testbed, initramfs, folder, "ann")) as ann,
        testbed.hypervisor.boot(machine(testbed, initramfs, folder, "bob")) as bob,
    ):
        await up(ann, "ann")
        await up(bob, "bob")
        yield daemon, ann, bob
        await ann.power_off()
        await bob.power_off()
        await daemon.stop()


async def test_guests_on_a_switch_ping_each_other_and_tcp_arrives_whole_both_ways(
    pair: tuple[Daemon, Guest, Guest],
) -> None:
    daemon, ann, bob = pair
    pinged = await ann.run(f"ping -c 3 -W 5 {ADDRESSES['bob']}")
    assert "3 packets received" in "\n".join(pinged.lines)

    await bob.run("iperf3 --server --daemon")
    for direction in ("", "--reverse"):
        answer = await ann.run(
            f"iperf3 --client {ADDRESSES['bob']} --bytes {SENT} {direction} --json", timeout_seconds=120
        )
        end = json.loads("\n".join(answer.lines))["end"]
        assert end["sum_sent"]["bytes"] >= SENT
        assert end["sum_received"]["bytes"] >= SENT * 0.9  # the last ones arrive when it has counted
    # Neither nc may see the end of its input: it would leave before the last bytes have come or gone.
    await bob.run(f"(sleep 60 | nc -l -p 7000 | head -c {FILE} | sha256sum >/tmp/received) & true")
    sent = await ann.run(f"head -c {FILE} /dev/urandom >/tmp/sent; sha256sum </tmp/sent")
    await ann.run(f"(cat /tmp/sent; sleep 60) | nc {ADDRESSES['bob']} 7000 & true")
    received = await bob.run("until [ -s /tmp/received ]; do usleep 10000; done; cat /tmp/received")
    assert received.lines == sent.lines
    # Segments of up to 64 KiB crossed the switch as the sender's kernel made them: far fewer frames than packets.
    metrics = await daemon.metrics()
    frames = metrics.total("hyperbell_requests_total", device="ann", op="transmit")
    assert 0 < frames < SENT // 1448
