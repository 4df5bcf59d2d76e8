"""A Linux guest with two processors and two pairs of queues on QEMU's network interface: both pairs carry frames."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
from guests.testbed import Testbed
from kit.front_end.frontend import Guest as RingGuest
from kit.front_end.links import SocketLink
from kit.net.packets import internet_sum

from guest.boot.initramfs import prepare_initramfs
from guest.boot.machine import Machine, shared_memory
from guest.boot.service import free_port, serve
from virtio.devices.net.address import mac_from_name

pytestmark = pytest.mark.guest

TRANSMIT = (1, 3)
RECEIVE = (0, 2)
MTU = 1400
OURS = bytes.fromhex("025e10000001")
GUEST_ADDRESS, OUR_ADDRESS = "10.9.0.1", "10.9.0.2"
GROUP = "239.1.2.3"
DISCARD = 9  # a UDP port that nobody listens at
COUNTED = "cat /sys/class/net/eth0/statistics/rx_packets"
CONFIG = f"""
[devices.vm]
type = "net"
backend = "switch"
switch = "lan"
socket = "vm.sock"
queues = 2
mtu = {MTU}

[devices.us]
type = "net"
backend = "switch"
switch = "lan"
socket = "us.sock"
queues = 2
"""


def machine(testbed: Testbed, initramfs: Path, folder: Path) -> Machine:
    # Without MSI-X: under TCG, QEMU 7.2 follows a null pointer when the guest unmasks a vector of it.
    interface = f"virtio-net-pci,netdev=net0,mac={mac_from_name('vm').hex(':')},host_mtu={MTU}"
    devices = [
        *shared_memory(256),
        *("-chardev", f"socket,id=net,path={folder}/vm.sock", "-netdev", "vhost-user,id=net0,chardev=net,queues=2"),
        *("-device", f"{interface},mq=on,disable-legacy=on,vectors=0"),
    ]
    return Machine(testbed.kernel.image, initramfs, devices, cpus=2)


def udp(payload: bytes) -> bytes:
    """A frame from us to the guest."""
    total = 28 + len(payload)
    addresses = socket.inet_aton(OUR_ADDRESS) + socket.inet_aton(GUEST_ADDRESS)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, total, 0, 0, 64, 17, 0) + addresses
    ip = ip[:10] + struct.pack(">H", 0xFFFF - internet_sum(ip)) + ip[12:]
    header = struct.pack(">HHHH", 1000, DISCARD, 8 + len(payload), 0)
    return mac_from_name("vm") + OURS + b"\x08\0" + ip + header + payload


async def test_both_pairs_of_a_guest_with_two_processors_carry_frames(testbed: Testbed, folder: Path) -> None:
    initramfs = prepare_initramfs(testbed.kernel, print, ("virtio_pci", "virtio_net"))
    port = free_port()
    config = folder / "net.toml"
    config.write_text(f'[daemon]\nmetrics = "127.0.0.1:{port}"\n{CONFIG}')
    async with (
        serve(config, folder, port) as daemon,
        testbed.hypervisor.boot(machine(testbed, initramfs, folder)) as guest,
    ):
        seen = await guest.run("cd /sys/class/net/eth0; ls -1 queues; cat mtu address; cd /")
        assert seen.lines == ["rx-0", "rx-1", "tx-0", "tx-1", str(MTU), mac_from_name("vm").hex(":")]
        await guest.run(f"ip link set eth0 up && ip addr add {GUEST_ADDRESS}/24 dev eth0")
        # To a group, so that the guest need not ask where we are.
        await guest.run("ip route add 224.0.0.0/4 dev eth0")
        for cpu in (1, 2):  # bits
            await guest.run(f"for i in 1 2 3 4 5; do taskset {cpu} ping -c 1 -W 1 {GROUP} & done; wait; true")
        metrics = await daemon.metrics()
        for queue in TRANSMIT:
            sent = metrics.total("hyperbell_requests_total", device="vm", queue=str(queue), op="transmit")
            assert sent >= 5, queue
        us = RingGuest(await SocketLink.connect(folder / "us.sock"))
        try:
            await us.start()
            before = int((await guest.run(COUNTED)).lines[0])
            for queue in TRANSMIT:
                for _ in range(5):
                    await us.queues[queue].request([bytes(12), udp(b"x" * 100)], [])
            await guest.run(f"until [ $({COUNTED}) -ge {before + 10} ]; do usleep 10000; done")
        finally:
            us.close()
        metrics = await daemon.metrics()
        for queue in RECEIVE:
            heard = metrics.total("hyperbell_requests_total", device="vm", queue=str(queue), op="receive")
            assert heard >= 5, queue
        await guest.power_off()
        await daemon.stop()
