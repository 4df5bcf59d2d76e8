"""Reports of a simulated input device as text, one a line: what its control socket and its script take.

Several of these, joined by ``;``, are one report:

* ``key KEY_A press``, ``release`` or ``tap`` (both, in a report each)
* ``move REL_X 5``, ``place ABS_X 1000``
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from virtio.devices.input.codes import EV_ABS, EV_KEY, EV_REL, parse_code
from virtio.devices.input.source import InputEvent

REPORT_HELP: Final = (
    "a report is: key KEY_A press|release|tap, move REL_X NUMBER, place ABS_X NUMBER; several joined by ;"
)


class ReportError(Exception):
    """The text is no report of this device; says why."""


class ReportParser:
    """Knows what the device can do: ``codes`` by event type, and least and most ``value`` of its absolute axes."""

    def __init__(self, codes: Mapping[int, Collection[int]], value: tuple[int, int]) -> None:
        self._codes = codes
        self._value = value

    def parse(self, text: str) -> list[list[InputEvent]]:
        """One report, and a second one where keys go up again. ``ReportError``."""
        report: list[InputEvent] = []
        afterwards: list[InputEvent] = []
        for part in text.split(";"):
            event, tap = self._event(part)
            report.append(event)
            if tap:
                afterwards.append(event._replace(value=0))
        return [report, afterwards] if afterwards else [report]

    def _event(self, text: str) -> tuple[InputEvent, bool]:
        """An event, and whether it is a key that goes up again."""
        match text.split():
            case ["key", name, ("press" | "tap" | "release") as how]:
                code = self._code(name, EV_KEY)
                return InputEvent(EV_KEY, code, int(how != "release")), how == "tap"
            case ["move", name, number]:
                return InputEvent(EV_REL, self._code(name, EV_REL), _number(number, -(1 << 31), (1 << 31) - 1)), False
            case ["place", name, number]:
                return InputEvent(EV_ABS, self._code(name, EV_ABS), _number(number, *self._value)), False
        raise ReportError(REPORT_HELP)

    def _code(self, name: str, wanted: int) -> int:
        try:
            kind, code = parse_code(name)
        except ValueError as error:
            raise ReportError(str(error)) from error
        if kind != wanted or code not in self._codes.get(kind, ()):
            raise ReportError(f"this device has no {name} here (events)")
        return code


def _number(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ReportError(f"{text!r} is not a number") from None
    if not least <= value <= most:
        raise ReportError(f"{value} is not from {least} to {most}")
    return value
