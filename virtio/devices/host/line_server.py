"""A Unix socket on which a simulated device is watched and driven: lines of text, one command a line.

Each command is answered by a line ``ok`` or ``error REASON``, after the lines it asked for. A client that said
``watch`` is told of every change by further lines, which may come at any time between those answers, for as long as it
keeps its half of the connection open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from virtio.clients import Door, Place, Places
from virtio.devices.host.outbox import Outbox
from virtio.socket_file import Listen, SocketFile

COMMAND_MAX: Final = 4096
"""Bytes of the longest line a client may send."""

CLIENTS_MAX: Final = 16
"""Beyond, the one that has been idle for longest gives way; clients that watch do not."""


class CommandError(Exception):
    """The command cannot be carried out; its text tells the client why."""


class LineClient:
    """Somebody at the socket."""

    def __init__(self, place: Place) -> None:
        self.outbox: Final = Outbox()
        self.place: Final = place
        self.scope: Final = place.scope
        self.watches = False
        self.finished = False
        """It has said all it had to say; what it was answered still goes out."""

    def send(self, line: str) -> None:
        """Never waits: a client that does not read what it asked for loses its connection."""
        if not self.outbox.put(line.encode() + b"\n"):
            self.scope.cancel()


Command = Callable[[LineClient, str], Awaitable[None]]
"""Carries out one line that is not empty; ``CommandError`` when that is impossible."""


class LineServer:
    """Listens at ``path`` (mode 0600) and hands each line to ``command``; ``what`` names the socket in errors.

    Without a ``path`` nobody ever comes.
    """

    def __init__(self, path: Path | None, what: str, command: Command) -> None:
        self._what = what
        self._command = command
        self._clients: set[LineClient] = set()
        self._places = Places(CLIENTS_MAX)
        self._file = SocketFile(Listen(path)) if path is not None else None

    def tell(self, line: str) -> None:
        """A change, for all who watch."""
        for client in self._clients:
            if client.watches:
                client.send(line)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if self._file is None:
            task_status.started()
            return
        door = Door(trio.socket.from_stdlib_socket(self._file.socket), f"a client of the {self._what} socket")
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                connection = await door.accept()
                nursery.start_soon(self._talk, trio.SocketStream(connection), self._places.take())

    async def _talk(self, stream: trio.SocketStream, place: Place | None) -> None:
        async with stream:
            if place is None:
                with trio.move_on_after(1):
                    await _send(stream, b"error there are too many clients that watch\n")
                return
            client = LineClient(place)
            self._clients.add(client)
            try:
                with client.scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._write, stream, client)
                        await self._read(stream, client)
                        client.finished = True
                        client.outbox.put(b"")  # wakes the writer, who ends this
            finally:
                self._clients.discard(client)
                self._places.leave(place)

    async def _write(self, stream: trio.SocketStream, client: LineClient) -> None:
        while await _send(stream, await client.outbox.get()):
            if client.finished and client.outbox.empty:
                break
        client.scope.cancel()

    async def _read(self, stream: trio.SocketStream, client: LineClient) -> None:
        begun = b""
        try:
            async for data in stream:
                *lines, begun = (begun + bytes(data)).split(b"\n")
                for line in lines:
                    await self._obey(client, line.decode(errors="replace").strip())
                if len(begun) > COMMAND_MAX:
                    client.send("error a line is too long")
                    break
        except trio.BrokenResourceError:
            pass  # it went away in the middle

    async def _obey(self, client: LineClient, line: str) -> None:
        if not line:
            return
        try:
            if len(line) > COMMAND_MAX:
                raise CommandError("the line is too long")
            self._places.active(client.place)
            if line == "watch":
                client.watches, client.place.rank = True, None
            else:
                await self._command(client, line)
        except CommandError as error:
            client.send(f"error {error}")
        else:
            client.send("ok")
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


async def _send(stream: trio.SocketStream, data: bytes) -> bool:
    """Whether somebody was there to take it."""
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        return False
    return True
