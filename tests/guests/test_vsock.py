"""Two real Linux guests with AF_VSOCK sockets: to the host, from the host, and to each other through one daemon.

They are User-mode Linux, up in a second each; test_everything.py has streams under QEMU.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from guests.vsock_conversations import MIB, digest, guest_to_guest, guest_to_host, host_to_guest, listening
from kit.guest.blk import pattern

from guest.boot.initramfs import compiled_program, prepare_initramfs
from guest.boot.machine import Guest
from guest.boot.service import Daemon, free_port, serve
from guest.boot.uml import UmlDevice, boot_uml
from guest.debian.kernel import Kernel

pytestmark = pytest.mark.guest

CIDS = {"ann": 3, "bob": 4}
CONFIG = "\n".join(
    f"""
[devices.{name}]
type = "vsock"
socket = "{name}.sock"
cid = {cid}
path = "{name}.vsock"
group = "lab"
"""
    for name, cid in CIDS.items()
)


@pytest.fixture
async def guests(uml: Kernel, folder: Path) -> AsyncIterator[tuple[Daemon, Guest, Guest]]:
    program = compiled_program("vsockcat", ["vsockcat.c"], print)
    initramfs = prepare_initramfs(uml, print, ("vmw_vsock_virtio_transport",), {"/bin/vsockcat": program})
    port = free_port()
    config = folder / "vsock.toml"
    config.write_text(f'[daemon]\nmetrics = "127.0.0.1:{port}"\n{CONFIG}')
    async with (
        serve(config, folder, port) as daemon,
        boot_uml(uml, initramfs, [UmlDevice(folder / "ann.sock", 19)]) as ann,
        boot_uml(uml, initramfs, [UmlDevice(folder / "bob.sock", 19)]) as bob,
    ):
        yield daemon, ann, bob
        await ann.power_off()
        await bob.power_off()
        await daemon.stop()


async def test_bytes_and_messages_reach_the_host_the_guest_and_the_other_guest_unchanged(
    guests: tuple[Daemon, Guest, Guest], folder: Path
) -> None:
    daemon, ann, bob = guests
    await guest_to_host(ann, folder)
    await host_to_guest(ann, folder)
    await guest_to_guest(ann, bob)
    await messages_to_and_from_host(ann, folder)
    await messages_between_guests(ann, bob)
    await nobody_there(ann, bob)
    metrics = await daemon.metrics()
    assert metrics.total("hyperbell_queue_broken") == 0
    assert metrics.total("hyperbell_request_errors_total") == 0
    assert metrics.total("hyperbell_request_bytes_total", device="ann", op="transmit") > 24 * MIB


async def messages_to_and_from_host(ann: Guest, folder: Path) -> None:
    """What was sent as one message arrives as one, on either side."""
    await ann.run("head -c 250000 /tmp/up >/tmp/messages")
    raw = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    await raw.bind(str(folder / "ann.vsock_6000"))
    raw.listen(1)
    sizes = [1, 44, 4096, 4097, 70_000, 65_536]
    received: list[bytes] = []

    async def serve_one() -> None:
        client, _ = await raw.accept()
        with client:
            while message := await client.recv(1 << 18):
                received.append(bytes(message))
            for size in sizes:
                await client.send(pattern(size, size))

    with raw:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_one)
            got = await ann.run("vsockcat -m 100000 connect 2 6000 </tmp/messages 2>/tmp/lengths | sha256sum")
    assert [len(message) for message in received] == [100_000, 100_000, 50_000]
    assert (await ann.run("sha256sum </tmp/messages")).lines == digest(b"".join(received))
    assert got.lines == digest(b"".join(pattern(size, size) for size in sizes))
    assert (await ann.run("cat /tmp/lengths")).lines == [f"message {size}" for size in sizes]


async def messages_between_guests(ann: Guest, bob: Guest) -> None:
    await bob.run("head -c 10000 /tmp/up >/tmp/messages")
    await listening(bob, "vsockcat -m 999 listen 81 </tmp/messages >/tmp/down")
    got = await ann.run("vsockcat -m 100000 connect 4 81 </tmp/messages 2>/tmp/lengths | sha256sum")
    assert got.lines == (await bob.run("sha256sum </tmp/messages")).lines
    assert (await ann.run("cat /tmp/lengths")).lines == ["message 999"] * 10 + ["message 10"]
    assert (await bob.run("wait; cat /tmp/said")).lines == ["ready", *["message 100000"] * 2, "message 50000"]
    assert (await bob.run("sha256sum </tmp/down")).lines == (await ann.run("sha256sum </tmp/messages")).lines


async def nobody_there(ann: Guest, bob: Guest) -> None:
    """Who is not there refuses at once: the host's port, the guest's port, and a guest that does not exist."""
    for guest, cid in ((ann, 2), (ann, 4), (bob, 3), (bob, 77)):
        answer = await guest.run(f"vsockcat connect {cid} 9999", status=1)
        assert answer.lines == ["vsockcat: connect: Connection reset by peer"]
