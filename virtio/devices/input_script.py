"""Events that a program sends over a Unix socket, one report a line.

Commands, several of them joined by ``;`` for one report (see ``line_server`` for the answers and ``watch``):

* ``key KEY_A press``, ``release`` or ``tap`` (both, in a report each)
* ``move REL_X 5``, ``place ABS_X 1000``

A light that the guest switches is told as ``light LED_CAPSL 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import trio

from virtio.devices.input_codes import CODE_COUNTS, EV_ABS, EV_KEY, EV_REL, code_name, parse_code
from virtio.devices.input_options import InputOptions
from virtio.devices.input_source import Description, InputEvent
from virtio.devices.line_server import CommandError, LineClient, LineServer

_HELP: Final = "a report is: key KEY_A press|release|tap, move REL_X NUMBER, place ABS_X NUMBER; several joined by ;"


class ScriptSource:
    """``HostError``: the socket cannot be had."""

    def __init__(self, options: InputOptions) -> None:
        self._codes = options.codes()
        self._range = options.range
        least, most = options.range
        self.description = Description(
            label=options.label.encode(),
            bits={kind: bitmap(codes) for kind, codes in self._codes.items()},
            axes=dict.fromkeys(options.axes(), (least, most, 0, 0, 0)),
        )
        self.emit: Callable[[Sequence[InputEvent]], bool] = lambda report: False
        control = options.control
        self._server = LineServer(control, "input control", self._obey)

    async def status(self, event: InputEvent) -> bool:
        if event.code not in self._codes.get(event.type, ()):
            return False
        self._server.tell(f"light {code_name(event.type, event.code)} {int(bool(event.value))}")
        return True

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._server.run(task_status=task_status)

    def close(self) -> None:
        self._server.close()

    async def _obey(self, client: LineClient, text: str) -> None:
        report: list[InputEvent] = []
        afterwards: list[InputEvent] = []
        for part in text.split(";"):
            event, tap = self._parse(part)
            report.append(event)
            if tap:
                afterwards.append(event._replace(value=0))
        taken = self.emit(report)
        if afterwards:
            taken = self.emit(afterwards) and taken
        if not taken:
            raise CommandError("no guest's driver runs")

    def _parse(self, text: str) -> tuple[InputEvent, bool]:
        """An event, and whether it is a key that goes up again."""
        match text.split():
            case ["key", name, ("press" | "tap" | "release") as how]:
                code = self._code(name, EV_KEY)
                return InputEvent(EV_KEY, code, int(how != "release")), how == "tap"
            case ["move", name, number]:
                return InputEvent(EV_REL, self._code(name, EV_REL), _number(number, -(1 << 31), (1 << 31) - 1)), False
            case ["place", name, number]:
                return InputEvent(EV_ABS, self._code(name, EV_ABS), _number(number, *self._range)), False
        raise CommandError(_HELP)

    def _code(self, name: str, wanted: int) -> int:
        try:
            kind, code = parse_code(name)
        except ValueError as error:
            raise CommandError(str(error)) from error
        if kind != wanted or code not in self._codes.get(kind, ()):
            raise CommandError(f"this device has no {name} here (events)")
        return code


def bitmap(codes: Sequence[int] | set[int]) -> bytes:
    """A bit for each code, as short as it can be."""
    bits = sum(1 << code for code in codes)
    assert bits < 1 << max(CODE_COUNTS.values())
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def _number(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise CommandError(f"{text!r} is not a number") from None
    if not least <= value <= most:
        raise CommandError(f"{value} is not from {least} to {most}")
    return value
