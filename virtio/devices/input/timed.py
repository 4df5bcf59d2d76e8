"""A script of an input device: a text file of reports (see ``input_reports``) with times between them.

Beside reports, a line may be ``wait SECONDS``, and the last one ``repeat``: from the beginning again, for ever. From a
``#`` to the end of its line is comment.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import trio

from virtio.devices.input.reports import REPORT_HELP, ReportError, ReportParser
from virtio.devices.input.source import PENDING_MAX, InputEvent
from virtio.errors import HostError

SCRIPT_MAX: Final = 1 << 20
"""Bytes of the largest script."""

WAIT_MIN: Final = 0.001
WAIT_MAX: Final = 86400.0
"""Seconds of the shortest and of the longest wait, a day."""


class Script(NamedTuple):
    """``steps``: seconds to wait, or a report to send."""

    steps: tuple[float | list[InputEvent], ...] = ()
    repeat: bool = False


def read_script(path: Path, reports: ReportParser) -> Script:
    """``HostError``: the file cannot be read, or this line of it is wrong."""
    try:
        text = _read(path).decode()
    except OSError as error:
        raise HostError(f"{path}: {os.strerror(error.errno or 0)}", errno=error.errno or 0) from error
    except UnicodeDecodeError as error:
        raise HostError(f"{path}: is not UTF-8 text") from error
    steps: list[float | list[InputEvent]] = []
    repeat = False
    at_once = 0  # events since the last wait
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].split()
        try:
            if not words:
                continue
            if repeat:
                raise ReportError("nothing can follow repeat")
            if words[0] == "wait":
                steps.append(_seconds(words[1:]))
                at_once = 0
            elif words == ["repeat"]:
                if not any(isinstance(step, float) for step in steps):
                    raise ReportError("what is repeated needs a wait in it")
                repeat = True
            else:
                for report in reports.parse(" ".join(words)):
                    steps.append(report)
                    at_once += len(report) + 1
                if at_once > PENDING_MAX:
                    raise ReportError(f"{at_once} events without a wait: at most {PENDING_MAX} can wait for the guest")
        except ReportError as error:
            reason = f"{error}; or: wait SECONDS, repeat" if str(error) == REPORT_HELP else str(error)
            raise HostError(f"{path}:{number}: {reason}") from error
    return Script(tuple(steps), repeat)


def _read(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a fifo would hold us up
        raise HostError(f"{path}: is not a regular file")
    with path.open("rb") as file:
        data = file.read(SCRIPT_MAX + 1)
    if len(data) > SCRIPT_MAX:
        raise HostError(f"{path}: is larger than {SCRIPT_MAX} bytes")
    return data


def _seconds(words: Sequence[str]) -> float:
    try:
        (seconds,) = map(float, words)
    except ValueError:
        raise ReportError("wait takes one number of seconds, for example: wait 0.5") from None
    if not WAIT_MIN <= seconds <= WAIT_MAX:  # nor is NaN
        raise ReportError(f"a wait is from {WAIT_MIN} to {WAIT_MAX:.0f} seconds")
    return seconds


class Player:
    """Plays a script to one driver after the other. There is nothing to play before the first ``rewind``."""

    def __init__(self, script: Script, emit: Callable[[Sequence[InputEvent]], bool]) -> None:
        self._script = script
        self._emit = emit
        self._next = len(script.steps)
        self._due: float | None = None  # when the wait at hand ends

    def rewind(self) -> None:
        self._next = 0
        self._due = None

    async def play(self) -> None:
        """To the end, or until cancelled; called again it goes on where it was."""
        steps, repeat = self._script
        while steps:
            if self._next == len(steps):
                if not repeat:
                    break
                self.rewind()
            step = steps[self._next]
            if isinstance(step, float):
                if self._due is None:
                    self._due = trio.current_time() + step
                await trio.sleep_until(self._due)
                self._due = None
            else:
                self._emit(step)
            self._next += 1
            await trio.lowlevel.checkpoint()
