"""Between a front-end and a back-end: messages and their descriptors are passed on, and what was said is kept."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio
from kit.front_end.vhost_user_wire import MESSAGE_NAMES, NEED_REPLY

HEADER: Final = 12
MOST_FDS: Final = 64


@dataclass(frozen=True)
class Said:
    """One message of the front-end's; ``connection`` counts from 0."""

    connection: int
    name: str
    need_reply: bool
    payload: bytes
    fds: int


class Relay:
    """Front-ends connect to the socket ``path``; the back-end is at ``target``. ``said`` is in order.

    ``front_end_listens``: it is the other way round.
    """

    def __init__(self, path: Path, target: Path, *, front_end_listens: bool = False) -> None:
        self.path = path
        self._front_end_listens = front_end_listens
        self.said: list[Said] = []
        self._target = target
        self._connections = 0

    async def serve(self, listener: trio.SocketListener) -> None:
        """One connection after the other, until this is cancelled."""
        while True:
            stream = await listener.accept()
            with stream.socket as come, trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone_to:
                try:
                    await gone_to.connect(str(self._target))
                except (FileNotFoundError, ConnectionRefusedError):
                    continue  # who came sees the connection close
                front, back = (gone_to, come) if self._front_end_listens else (come, gone_to)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass, front, back, self._connections, nursery.cancel_scope)
                    nursery.start_soon(self._pass, back, front, None, nursery.cancel_scope)
            self._connections += 1

    async def _pass(
        self,
        source: trio.socket.SocketType,
        sink: trio.socket.SocketType,
        connection: int | None,
        scope: trio.CancelScope,
    ) -> None:
        """Until one of them closes, which ends both directions. ``connection``: keep what was said on it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while message := await _receive(source):
                header, payload, fds = message
                if connection is not None:
                    number, flags, _ = struct.unpack("=III", header)
                    said = Said(
                        connection,
                        MESSAGE_NAMES[number].removeprefix("VHOST_USER_"),
                        bool(flags & NEED_REPLY),
                        payload,
                        len(fds),
                    )
                    self.said.append(said)
                try:
                    await _send(sink, header + payload, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        scope.cancel()


async def _receive(source: trio.socket.SocketType) -> tuple[bytes, bytes, list[int]] | None:
    """Header, payload and descriptors of the next message; None at the end."""
    fds = array.array("i")
    header = b""
    while len(header) < HEADER:
        data, ancillary, _, _ = await source.recvmsg(HEADER - len(header), socket.CMSG_SPACE(MOST_FDS * fds.itemsize))
        for level, kind, content in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not data:
            return None
        header += data
    size = struct.unpack_from("=I", header, 8)[0]
    payload = b""
    while len(payload) < size:
        data = await source.recv(size - len(payload))
        if not data:
            return None
        payload += data
    return header, payload, list(fds)


async def _send(sink: trio.socket.SocketType, message: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = await sink.sendmsg([message], rights)
    while sent < len(message):
        sent += await sink.send(message[sent:])


@asynccontextmanager
async def relay(path: Path, target: Path, *, front_end_listens: bool = False) -> AsyncIterator[Relay]:
    """A relay that serves in the background until the block is left."""
    raw = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await raw.bind(str(path))
    raw.listen(1)
    async with trio.SocketListener(raw) as listener, trio.open_nursery() as nursery:
        made = Relay(path, target, front_end_listens=front_end_listens)
        nursery.start_soon(made.serve, listener)
        yield made
        nursery.cancel_scope.cancel()


def notifies(said: Sequence[Said]) -> set[str]:
    """All that the front-end notified by, and gave to be notified by."""
    kinds = {"SET_VRING_KICK": "kick fd", "SET_VRING_CALL": "call fd"}
    found = {kinds[each.name] for each in said if each.name in kinds and each.fds}
    return found | {each.name for each in said if each.name == "VRING_KICK"}
