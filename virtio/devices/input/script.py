"""Events that a program sends over a Unix socket, one report a line.

See ``input_reports`` for what a report looks like, ``line_server`` for the answers and ``watch``. A light that the
guest switches is told as ``light LED_CAPSL 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from virtio.devices.host.line_server import CommandError, LineClient, LineServer
from virtio.devices.input.codes import CODE_COUNTS, code_name
from virtio.devices.input.options import InputOptions
from virtio.devices.input.reports import ReportError
from virtio.devices.input.source import Description, InputEvent


class ScriptSource:
    """``HostError``: the socket cannot be had."""

    def __init__(self, options: InputOptions) -> None:
        self._codes = options.codes()
        self._reports = options.reports()
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
        try:
            reports = self._reports.parse(text)
        except ReportError as error:
            raise CommandError(str(error)) from error
        taken = [self.emit(report) for report in reports]
        if not all(taken):
            raise CommandError("no guest's driver runs")


def bitmap(codes: Sequence[int] | set[int]) -> bytes:
    """A bit for each code, as short as it can be."""
    bits = sum(1 << code for code in codes)
    assert bits < 1 << max(CODE_COUNTS.values())
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")
