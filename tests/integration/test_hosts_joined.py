"""Guests of daemons on two hosts, joined as docs/devices/net.md says: two network namespaces are the hosts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from kit.net.own_network import enter_network, own_network
from kit.net.station import joined, station

UNDERLAY_MTU = 1500
MTU = UNDERLAY_MTU - 50  # VXLAN's headers
BETWEEN = ("192.0.2.1", "192.0.2.2")


def ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    if "vxlan" in command and ("Unknown device type" in done.stderr or "not supported" in done.stderr):
        pytest.skip(f"this kernel has no VXLAN: {done.stderr.strip()}")
    assert done.returncode == 0, f"ip {command}: {done.stderr}"


def network_fd() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def set_up_host(number: int) -> None:
    """The lines of docs/devices/net.md, on host ``number``."""
    here, there = BETWEEN[number], BETWEEN[1 - number]
    ip(f"addr add {here}/24 dev wire")
    ip("link set wire up")
    ip("link add br0 type bridge")
    ip(f"link add vxlan0 type vxlan id 42 local {here} remote {there} dstport 4789 dev wire")
    ip("link set vxlan0 master br0 up")
    ip("link set br0 up")


@pytest.fixture
def other_host() -> Iterator[int]:
    """This thread is on one host inside the test; the network of the other, as a file descriptor."""
    with own_network():
        first = network_fd()
        try:
            with own_network():
                second = network_fd()
                ip(f"link add wire type veth peer name wire netns /proc/{os.getpid()}/fd/{first}")
                set_up_host(1)
        finally:
            os.close(first)
        try:
            set_up_host(0)
            yield second
        finally:
            os.close(second)


async def test_frames_pass_between_guests_on_two_hosts_over_vxlan(other_host: int) -> None:
    here = network_fd()
    tap: dict[str, Any] = {"backend": "tap", "tap": "hb0", "bridge": "br0", "mtu": MTU}
    try:
        async with station("a", **tap) as a:
            enter_network(other_host)
            try:
                async with station("b", **tap) as b:
                    await joined(a, b)
                    for payload in (b"x" * 46, b"y" * MTU):
                        for sender, receiver in ((a, b), (b, a)):
                            sent = await sender.send(payload, receiver.mac)
                            assert await receiver.wait_for(sent.__eq__) == sent
            finally:
                enter_network(here)
    finally:
        os.close(here)
