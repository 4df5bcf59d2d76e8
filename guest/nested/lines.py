"""Serial lines: each carries the console of one machine, however deep it is nested, straight to this process."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from guest.boot.console import Console, ConsoleLine, MachineError


@dataclass(frozen=True)
class Line:
    """One line: our end of it, the device that is its other end in the machine that runs the guest, and its record."""

    ours: socket.socket
    device: str
    record: Path

    def seen_as(self, device: str) -> Line:
        """The same line where it has another name: one level deeper."""
        return replace(self, device=device)


class LineConsole(Console):
    """The console at the end of ``line``. What it says is also appended to the line's record."""

    patience = 4  # everything here is emulated, beside whatever else the machine does

    def __init__(self, name: str, line: Line) -> None:
        super().__init__(self._write_down)
        self.name = name
        self.line = line
        self.lost = False  # late once: whoever uses the line next cannot tell whose answer comes
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(line.ours.dup()))

    async def close(self) -> None:
        """Leave the line; it can be used again."""
        await self._stream.aclose()

    async def _receive(self) -> bytes:
        return bytes(await self._stream.receive_some(65536))

    async def _transmit(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise MachineError(f"{self.name}: the line is closed", self.tail()) from error

    async def _why_ended(self) -> str:
        self.lost = True
        return f"{self.name}: the line was closed from the other side"

    def _late(self, message: str) -> MachineError:
        self.lost = True
        return MachineError(f"{self.name}: {message} (its whole console: {self.line.record})", self.tail())

    def _write_down(self, line: ConsoleLine) -> None:
        with self.line.record.open("a") as record:
            record.write(f"{line.seconds:8.2f}  {line.text}\n")
