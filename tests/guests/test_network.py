"""Two real Linux guests on one switch: they reach each other, and TCP with all its offloads arrives whole.

They are User-mode Linux, up in a second each; test_everything.py has this under QEMU.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from guests.iperf import tcp_goes_both_ways

from guest.boot.initramfs import prepare_initramfs, program_files
from guest.boot.machine import Guest
from guest.boot.service import Daemon, free_port, serve
from guest.boot.uml import UmlDevice, boot_uml
from guest.debian.kernel import Kernel

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
NAMES = ("ann", "bob")
ADDRESSES = {"ann": "10.9.0.1", "bob": "10.9.0.2"}
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


@pytest.fixture
async def pair(uml: Kernel, folder: Path) -> AsyncIterator[tuple[Daemon, Guest, Guest]]:
    """The daemon, and the two guests with their interfaces up."""
    initramfs = prepare_initramfs(uml, print, ("virtio_net",), program_files("iperf3", "iperf3"))
    port = free_port()
    config = folder / "net.toml"
    config.write_text(f'[daemon]\nmetrics = "127.0.0.1:{port}"\n{CONFIG}')
    async with (
        serve(config, folder, port) as daemon,
        boot_uml(uml, initramfs, [UmlDevice(folder / "ann.sock", 1)]) as ann,
        boot_uml(uml, initramfs, [UmlDevice(folder / "bob.sock", 1)]) as bob,
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

    await tcp_goes_both_ways(ann, bob, ADDRESSES["bob"], SENT)
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
