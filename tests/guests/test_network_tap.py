"""A real Linux guest on a tap that is a port of a bridge: it and the host reach each other, and TCP arrives whole."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from guests.testbed import Testbed
from kit.net.own_network import own_network
from kit.net.packets import internet_sum

from guest.boot.initramfs import prepare_initramfs
from guest.boot.machine import Machine, shared_memory
from guest.boot.service import hyperbell_command
from virtio.testing.queue import GUARD

pytestmark = pytest.mark.guest

GUEST, HOST = "10.9.0.1", "10.9.0.254"
TO_HOST, TO_GUEST = 7000, 7001
FILE = 8 * 1024 * 1024
PATIENCE = 60.0
MAC = "52:54:00:00:00:0a"
CONFIG = """
[daemon]
metrics = "off"

[devices.vm]
type = "net"
backend = "tap"
tap = "hb0"
bridge = "br0"
socket = "vm.sock"
"""


@pytest.fixture
def initramfs(testbed: Testbed) -> Path:
    return prepare_initramfs(testbed.kernel, print, ("virtio_pci", "virtio_net"))


@pytest.fixture
def daemon(initramfs: Path, folder: Path) -> Iterator[Path]:
    """The socket of a daemon whose host is a network namespace with a bridge; this thread is on that host too."""
    assert initramfs.exists()  # whatever had to be fetched for it was fetched outside
    with own_network():
        for line in ("link add br0 type bridge", f"addr add {HOST}/24 dev br0", "link set br0 up"):
            done = subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)
            if "Unknown device type" in done.stderr or "not supported" in done.stderr:
                pytest.skip(f"this kernel has no bridges: {done.stderr.strip()}")
            assert done.returncode == 0, f"ip {line}: {done.stderr}"
        config = folder / "net.toml"
        config.write_text(CONFIG)
        with (folder / "log").open("w") as log:
            # A child of this thread, so it is in the same network.
            process = subprocess.Popen([hyperbell_command(), "serve", config], cwd=folder, stdout=log, stderr=log)
            try:
                give_up = time.monotonic() + GUARD
                while not (folder / "vm.sock").exists():
                    if process.poll() is not None or time.monotonic() > give_up:
                        pytest.fail(f"the daemon is not ready:\n{(folder / 'log').read_text()}")
                    time.sleep(0.02)
                yield folder / "vm.sock"
            finally:
                process.terminate()
                code = process.wait(GUARD)
        assert code == 0, (folder / "log").read_text()


def machine(testbed: Testbed, initramfs: Path, path: Path) -> Machine:
    devices = [
        *shared_memory(256),
        *("-chardev", f"socket,id=net,path={path}", "-netdev", "vhost-user,id=net0,chardev=net"),
        # Without MSI-X: under TCG, QEMU 7.2 follows a null pointer when the guest unmasks a vector of it.
        *("-device", f"virtio-net-pci,netdev=net0,mac={MAC},disable-legacy=on,vectors=0"),
    ]
    return Machine(testbed.kernel.image, initramfs, devices)


async def ping(address: str, count: int) -> None:
    """As ping(8): each request is answered, by its payload."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        for number in range(count):
            payload = os.urandom(1000)
            echo = struct.pack(">BBHHH", 8, 0, 0, 7, number) + payload
            echo = echo[:2] + struct.pack(">H", 0xFFFF - internet_sum(echo)) + echo[4:]
            await raw.sendto(echo, (address, 0))
            with trio.fail_after(GUARD):
                while True:
                    data, (source, *_) = await raw.recvfrom(2000)
                    if source == address and data[20] == 0:
                        break
            assert data[24:] == echo[4:]


async def from_guest(listener: trio.socket.SocketType) -> str:
    """The digest of the file that the guest sends."""
    digest, left = hashlib.sha256(), FILE
    with trio.fail_after(PATIENCE):
        connection, _ = await listener.accept()
        with connection:
            while left:
                data = await connection.recv(min(left, 1 << 18))
                assert data, f"{left} bytes are missing"
                digest.update(data)
                left -= len(data)
    return digest.hexdigest()


async def to_guest(data: bytes) -> None:
    with trio.fail_after(PATIENCE):
        while True:
            with trio.socket.socket() as connection:
                try:
                    await connection.connect((GUEST, TO_GUEST))
                except ConnectionRefusedError:  # nobody listens yet
                    await trio.sleep(0.05)
                    continue
                rest = memoryview(data)
                while rest:
                    rest = rest[await connection.send(rest) :]
                return  # the kernel sees to it that what is under way arrives


async def test_a_guest_on_a_tap_and_its_host_ping_each_other_and_tcp_arrives_whole_both_ways(
    testbed: Testbed, initramfs: Path, daemon: Path
) -> None:
    async with testbed.hypervisor.boot(machine(testbed, initramfs, daemon)) as guest:
        await guest.run(f"ip link set lo up; ip link set eth0 up && ip addr add {GUEST}/24 dev eth0")
        pinged = await guest.run(f"ping -c 3 -W 5 {HOST}")
        assert "3 packets received" in "\n".join(pinged.lines)
        await ping(GUEST, 3)

        # nc may not see the end of its input: it would leave before the last bytes have gone.
        with trio.socket.socket() as listener:
            await listener.bind((HOST, TO_HOST))
            listener.listen()
            sent = await guest.run(f"head -c {FILE} /dev/urandom >/tmp/sent; sha256sum </tmp/sent")
            await guest.run(f"(cat /tmp/sent; sleep 60) | nc {HOST} {TO_HOST} & true")
            assert sent.lines == [f"{await from_guest(listener)}  -"]

        data = os.urandom(FILE)
        await guest.run(f"(sleep 60 | nc -l -p {TO_GUEST} | head -c {FILE} | sha256sum >/tmp/received) & true")
        await to_guest(data)
        received = await guest.run("until [ -s /tmp/received ]; do usleep 10000; done; cat /tmp/received")
        assert received.lines == [f"{hashlib.sha256(data).hexdigest()}  -"]
        await guest.power_off()
