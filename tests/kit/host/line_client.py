"""A client of the sockets on which simulated devices are driven."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from virtio.testing.queue import GUARD


class Talker(ABC):
    """Lines of text, there and back."""

    @abstractmethod
    async def send(self, text: str) -> None:
        """One line there."""

    @abstractmethod
    async def line(self) -> str:
        """The next line; "" at the end."""

    async def command(self, text: str) -> list[str]:
        """The lines of the answer, the last of which is "ok" or begins with "error"."""
        await self.send(text)
        lines = [await self.line()]
        while lines[-1] != "ok" and not lines[-1].startswith("error"):
            assert lines[-1], f"the connection ended: {lines}"
            lines.append(await self.line())
        return lines


class LineTalker(Talker):
    """At a socket of this machine."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._come = b""

    async def send(self, text: str) -> None:
        await self.stream.send_all(text.encode() + b"\n")

    async def line(self) -> str:
        with trio.fail_after(GUARD):
            while b"\n" not in self._come:
                more = await self.stream.receive_some()
                if not more:
                    return ""
                self._come += more
        line, _, self._come = self._come.partition(b"\n")
        return line.decode()

    async def rest(self) -> list[str]:
        lines = []
        while line := await self.line():
            lines.append(line)
        return lines


@asynccontextmanager
async def talking(path: Path) -> AsyncIterator[LineTalker]:
    async with await trio.open_unix_socket(path) as stream:
        yield LineTalker(stream)
