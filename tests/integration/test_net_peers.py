"""QEMU's own netdevs as the peer of a network device: another implementation of the two formats."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from kit.net.internet import Host
from kit.net.station import Station, free_port, station

from virtio.testing.queue import GUARD

QEMU = "qemu-system-x86_64"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def qemu_network(netdev: str) -> AsyncIterator[None]:
    """A QEMU without a machine: its user network (10.0.2.2), behind ``netdev``."""
    command = [QEMU, "-M", "none", "-nodefaults", "-display", "none", "-monitor", "none"]
    command += ["-netdev", "user,id=user", "-netdev", f"{netdev},id=peer"]
    for number, name in enumerate(("user", "peer")):
        command += ["-netdev", f"hubport,hubid=0,id=port{number},netdev={name}"]
    process = await trio.lowlevel.open_process(["timeout", "60", *command], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def speaks_to_qemu(s: Station) -> None:
    """Frames pass both ways: QEMU's network gives the station an address and answers its pings."""
    host = Host(s, "10.0.2.15")
    with trio.fail_after(GUARD):
        while True:  # until QEMU is there
            with trio.move_on_after(0.2):
                assert (await host.arp("10.0.2.2"))[4:] == bytes([2, 2])
                break
        await host.dhcp()
        assert str(host.address) == "10.0.2.15"
        await host.arp("10.0.2.2")
        await host.ping("10.0.2.2")


async def test_a_qemu_that_listens_is_reached_as_a_stream(folder: Path) -> None:
    path = folder / "s"
    netdev = f"stream,server=on,addr.type=unix,addr.path={path}"
    async with station("a", backend="socket", remote=f"unix:{path}") as s:
        for _ in range(2):  # QEMU is started anew, and found again
            async with qemu_network(netdev):
                await speaks_to_qemu(s)


async def test_a_qemu_that_connects_is_let_in_as_a_stream(folder: Path) -> None:
    path = folder / "s"
    netdev = f"stream,server=off,addr.type=unix,addr.path={path}"
    async with station("a", backend="socket", local=f"unix:{path}") as s, qemu_network(netdev):
        await speaks_to_qemu(s)


async def test_a_qemu_exchanges_datagrams(folder: Path) -> None:
    ours, theirs = folder / "a", folder / "b"
    netdev = f"dgram,local.type=unix,local.path={theirs},remote.type=unix,remote.path={ours}"
    addresses: dict[str, Any] = {"local": f"unixgram:{ours}", "remote": f"unixgram:{theirs}"}
    async with station("a", backend="socket", **addresses) as s, qemu_network(netdev):
        await speaks_to_qemu(s)


async def test_a_qemu_with_the_socket_netdev_of_old_speaks_the_same_stream(folder: Path) -> None:
    port = free_port()
    netdev = f"socket,connect=127.0.0.1:{port}"
    async with station("a", backend="socket", local=f"tcp:127.0.0.1:{port}") as s, qemu_network(netdev):
        await speaks_to_qemu(s)
