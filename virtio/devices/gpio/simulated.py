"""Simulated GPIO lines, driven and watched over a Unix socket.

Commands (``LINE`` is a number or a name; see ``line_server`` for the answers and ``watch``):

* ``list``: every line, as below
* ``get LINE``: one line
* ``set LINE 0|1``: the level from outside, which the guest senses while the line is not an output
* ``pulse LINE``: the other level and back, for an edge of each kind

A line is told as ``line NUMBER DIRECTION VALUE INTERRUPT NAME``: DIRECTION is ``none``, ``output`` or ``input``, VALUE
what is on the line now, INTERRUPT ``none``, ``rising``, ``falling``, ``both``, ``high`` or ``low``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from virtio.devices.gpio.lines import (
    VIRTIO_GPIO_DIRECTION_IN,
    VIRTIO_GPIO_DIRECTION_NONE,
    VIRTIO_GPIO_DIRECTION_OUT,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_BOTH,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING,
    VIRTIO_GPIO_IRQ_TYPE_LEVEL_HIGH,
    VIRTIO_GPIO_IRQ_TYPE_LEVEL_LOW,
    VIRTIO_GPIO_IRQ_TYPE_NONE,
    Edge,
)
from virtio.devices.host.line_server import CommandError, LineClient, LineServer

_DIRECTIONS: Final = {
    VIRTIO_GPIO_DIRECTION_NONE: "none",
    VIRTIO_GPIO_DIRECTION_OUT: "output",
    VIRTIO_GPIO_DIRECTION_IN: "input",
}
_INTERRUPTS: Final = {
    VIRTIO_GPIO_IRQ_TYPE_NONE: "none",
    VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING: "rising",
    VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING: "falling",
    VIRTIO_GPIO_IRQ_TYPE_EDGE_BOTH: "both",
    VIRTIO_GPIO_IRQ_TYPE_LEVEL_HIGH: "high",
    VIRTIO_GPIO_IRQ_TYPE_LEVEL_LOW: "low",
}


@dataclass
class _Line:
    outside: bool = False
    """The level that something outside of the guest drives it to."""
    output: bool = False
    """What the guest drives it to, once it is an output."""
    direction: int = VIRTIO_GPIO_DIRECTION_NONE
    interrupt: int = VIRTIO_GPIO_IRQ_TYPE_NONE

    @property
    def value(self) -> bool:
        return self.output if self.direction == VIRTIO_GPIO_DIRECTION_OUT else self.outside


class SimulatedLines:
    """As many lines as there are ``names``; all low from outside at first. With ``control`` a socket drives them."""

    def __init__(self, names: Sequence[str], control: Path | None) -> None:
        self.names = names
        self.on_edge: Edge = lambda line, rising: None
        self._lines = [_Line() for _ in names]
        self._server = LineServer(control, "gpio control", self._obey)

    # ---- the guest's side ----

    async def direction(self, line: int) -> int:
        return self._lines[line].direction

    async def set_direction(self, line: int, direction: int) -> None:
        changed = self._lines[line]
        changed.direction = direction
        if direction == VIRTIO_GPIO_DIRECTION_NONE:
            changed.output = False
        self._tell(line)

    async def value(self, line: int) -> bool:
        return self._lines[line].value

    async def set_value(self, line: int, value: bool) -> None:
        self._lines[line].output = value
        self._tell(line)

    async def watch(self, line: int, interrupt_type: int) -> None:
        self._lines[line].interrupt = interrupt_type
        self._tell(line)

    def reset(self) -> None:
        for number, line in enumerate(self._lines):
            before = self._describe(number)
            line.output = False
            line.direction = VIRTIO_GPIO_DIRECTION_NONE
            line.interrupt = VIRTIO_GPIO_IRQ_TYPE_NONE
            if self._describe(number) != before:
                self._tell(number)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._server.run(task_status=task_status)

    def close(self) -> None:
        self._server.close()

    # ---- the other side ----

    def drive(self, line: int, level: bool) -> None:
        """Something outside of the guest drives the line to ``level``."""
        changed = self._lines[line]
        before, changed.outside = changed.value, level
        if changed.value != before:
            self._tell(line)
            self.on_edge(line, changed.value)

    async def _obey(self, client: LineClient, text: str) -> None:
        command, _, rest = text.partition(" ")
        if command == "list" and not rest:
            for number in range(len(self._lines)):
                client.send(self._describe(number))
        elif command == "get":
            client.send(self._describe(self._find(rest)))
        elif command == "set":
            name, _, level = rest.rpartition(" ")
            if level not in ("0", "1"):
                raise CommandError("set LINE 0, or set LINE 1")
            self.drive(self._find(name), level == "1")
        elif command == "pulse":
            number = self._find(rest)
            level_before = self._lines[number].outside
            self.drive(number, not level_before)
            self.drive(number, level_before)
        else:
            raise CommandError("the commands are: list, get LINE, set LINE 0|1, pulse LINE, watch")

    def _find(self, name: str) -> int:
        name = name.strip()
        if name.isdecimal() and name.isascii() and int(name[:6]) < len(self._lines):
            return int(name)
        if name and name in self.names:
            return self.names.index(name)
        raise CommandError(f"there is no line {name!r}")

    def _describe(self, number: int) -> str:
        line = self._lines[number]
        facts = f"{_DIRECTIONS[line.direction]} {int(line.value)} {_INTERRUPTS[line.interrupt]}"
        return f"line {number} {facts} {self.names[number]}".rstrip()

    def _tell(self, number: int) -> None:
        self._server.tell(self._describe(number))
