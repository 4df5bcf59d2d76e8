"""Conversations over AF_VSOCK between guests and the host, whose bytes must arrive unchanged.

The guest ``ann`` has CID 3 and its sockets at ``ann.vsock`` in the test's folder, ``bob`` has CID 4. Both need
``vsockcat``.
"""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import trio
from kit.guest.blk import pattern

from guest.boot.console import Console

MIB = 1024 * 1024


async def listening(guest: Console, command: str) -> None:
    """Run a ``vsockcat listen`` in the background, and wait until it listens."""
    await guest.run(f"{command} 2>/tmp/said & until grep -q ready /tmp/said; do usleep 10000; done")


async def converse(stream: trio.SocketStream, data: bytes) -> bytes:
    """Send ``data`` and its end, while everything that comes is read until its end."""
    received = bytearray()

    async def send() -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        async for piece in stream:
            received += piece
    return bytes(received)


def digest(data: bytes) -> list[str]:
    return [f"{hashlib.sha256(data).hexdigest()}  -"]


async def guest_to_host(ann: Console, folder: Path) -> None:
    """The guest connects to port 5000 of the host; a program there answers with other bytes."""
    answer = pattern(5 * MIB + 1, 1)
    received: list[bytes] = []
    raw = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await raw.bind(str(folder / "ann.vsock_5000"))
    raw.listen(1)
    await ann.run(f"head -c {8 * MIB} /dev/urandom >/tmp/up")
    async with trio.SocketListener(raw) as listener, trio.open_nursery() as nursery:

        async def serve_one() -> None:
            received.append(await converse(await listener.accept(), answer))

        nursery.start_soon(serve_one)
        got = await ann.run("vsockcat connect 2 5000 </tmp/up | sha256sum", timeout_seconds=40)
        assert got.lines == digest(answer)
    assert (await ann.run("sha256sum </tmp/up")).lines == digest(received[0])
    assert len(received[0]) == 8 * MIB


async def host_to_guest(ann: Console, folder: Path) -> None:
    """A program of the host says CONNECT; the guest answers with the bytes it has."""
    question = pattern(8 * MIB + 3, 2)
    await listening(ann, "vsockcat listen 1234 </tmp/up >/tmp/down")
    stream = await trio.open_unix_socket(folder / "ann.vsock")
    await stream.send_all(b"CONNECT 1234\n")
    greeting = b""
    while not greeting.endswith(b"\n"):
        greeting += bytes(await stream.receive_some(1))
    assert greeting.startswith(b"OK ")
    with trio.fail_after(90):
        answer = await converse(stream, question)
    assert (await ann.run("sha256sum </tmp/up")).lines == digest(answer)
    assert (await ann.run("wait; sha256sum </tmp/down")).lines == digest(question)


async def guest_to_guest(ann: Console, bob: Console) -> None:
    """Both send and receive at once."""
    await bob.run(f"head -c {4 * MIB} /dev/urandom >/tmp/up")
    await listening(bob, "vsockcat listen 80 </tmp/up >/tmp/down")
    got = await ann.run("vsockcat connect 4 80 </tmp/up | sha256sum", timeout_seconds=40)
    assert got.lines == (await bob.run("sha256sum </tmp/up")).lines
    received = await bob.run("wait; sha256sum </tmp/down", timeout_seconds=40)
    assert received.lines == (await ann.run("sha256sum </tmp/up")).lines
