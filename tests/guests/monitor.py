"""The monitor of a test's QEMU: events, and commands as an operator types them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

ANSWER_SECONDS = 30


class Monitor:
    """QMP over a Unix socket. Events that come while another thing is waited for are kept."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""
        self._events: list[dict[str, Any]] = []

    async def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            received = await self._stream.receive_some(65536)
            assert received, "QEMU closed its monitor"
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    async def execute(self, command: str, **arguments: object) -> Any:
        """Carry out a command; what it returns."""
        request = {"execute": command, "arguments": arguments}
        await self._stream.send_all(json.dumps(request).encode() + b"\n")
        with trio.fail_after(ANSWER_SECONDS):
            while True:
                message = await self._message()
                if "event" in message:
                    self._events.append(message)
                    continue
                assert "return" in message, message
                return message["return"]

    async def type(self, line: str) -> str:
        """Carry out a line of the human monitor; what it prints."""
        return str(await self.execute("human-monitor-command", **{"command-line": line}))

    async def event(self, name: str, **data: object) -> None:
        """Wait for an event with ``data``."""
        with trio.fail_after(ANSWER_SECONDS):
            while True:
                for message in self._events:
                    if message["event"] == name and data.items() <= message["data"].items():
                        self._events.remove(message)
                        return
                message = await self._message()
                assert "event" in message, message
                self._events.append(message)


def monitor_options(folder: Path) -> list[str]:
    """What QEMU is told so that ``monitor`` reaches it."""
    return ["-qmp", f"unix:{folder / 'qmp.sock'},server=on,wait=off"]


@asynccontextmanager
async def monitor(folder: Path) -> AsyncIterator[Monitor]:
    async with await trio.open_unix_socket(str(folder / "qmp.sock")) as stream:
        opened = Monitor(stream)
        greeting = await opened._message()
        assert "QMP" in greeting
        await opened.execute("qmp_capabilities")
        yield opened
