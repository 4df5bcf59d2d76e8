"""Where the events of an input device come from, and the bounded queue they wait in for the guest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import trio

from virtio.devices.input.codes import EV_ABS, EV_KEY, EV_SW, EV_SYN, SYN_DROPPED, SYN_REPORT

PENDING_MAX: Final = 1024
"""Events that wait for a guest which takes none."""


class InputEvent(NamedTuple):
    """5.8.6: ``value`` is signed."""

    type: int
    code: int
    value: int


REPORT: Final = InputEvent(EV_SYN, SYN_REPORT, 0)
DROPPED: Final = InputEvent(EV_SYN, SYN_DROPPED, 0)


@dataclass
class Description:
    """What the guest is told of the device (5.8.4)."""

    label: bytes = b""
    serial: bytes = b""
    ids: tuple[int, int, int, int] = (6, 0, 0, 1)  # bus type BUS_VIRTUAL, vendor, product, version
    properties: bytes = b""
    bits: Mapping[int, bytes] = field(default_factory=dict)
    """Event type to the bitmap of its codes."""
    axes: Mapping[int, tuple[int, int, int, int, int]] = field(default_factory=dict)
    """Absolute axis to minimum, maximum, fuzz, flat, resolution."""


class Source(Protocol):
    """A source of events. ``description`` is fixed; events go to ``emit``, a whole report at once."""

    description: Description
    emit: Callable[[Sequence[InputEvent]], bool]
    """Set by the device: a report less its SYN_REPORT; False when no guest takes it."""

    async def status(self, event: InputEvent) -> bool:
        """The guest sets a light, or beeps; False when it cannot be done."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...
    def close(self) -> None: ...


class EventQueue:
    """Reports on their way to the guest, whole ones only (5.8.6.2).

    It knows what the guest has been told of keys, switches and axes. When it overflows, what waited is dropped and
    one report makes up for it, so that no key stays down which is up.
    """

    def __init__(self) -> None:
        self._reports: deque[list[InputEvent]] = deque()
        self._current: deque[InputEvent] = deque()  # of a report that the guest has begun to read
        self._size = 0
        self._now: dict[tuple[int, int], int] = {}
        self._told: dict[tuple[int, int], int] = {}
        self._arrived = trio.Event()
        self.dropped = 0

    def put(self, report: Sequence[InputEvent], *, keep: bool = True) -> None:
        """A report; without ``keep`` it only counts for what is known of the device."""
        for event in report:
            if event.type in (EV_KEY, EV_SW, EV_ABS):
                self._now[event.type, event.code] = min(event.value, 1) if event.type == EV_KEY else event.value
        if not keep:
            return
        if self._size + len(report) + 1 > PENDING_MAX:
            self.dropped += 1
            self.catch_up()
        else:
            self._append([*report, REPORT])

    def catch_up(self) -> None:
        """Drop what waits, and bring the guest to where the device is now."""
        self._reports.clear()
        self._size = 0
        changes = [InputEvent(*code, value) for code, value in self._now.items() if value != self._told.get(code, 0)]
        if changes or self.dropped:
            self._append([*([DROPPED, REPORT] if self.dropped else []), *changes, REPORT])
        self.dropped = 0

    def _append(self, report: list[InputEvent]) -> None:
        self._reports.append(report)
        self._size += len(report)
        self._arrived.set()

    def forget_guest(self) -> None:
        """A new driver: it thinks that all keys are up."""
        self._reports.clear()
        self._current.clear()
        self._size = 0
        self._told.clear()

    async def wait(self) -> None:
        while not self._current and not self._reports:
            self._arrived = trio.Event()
            await self._arrived.wait()

    def take(self) -> InputEvent | None:
        """The next event, if there is one. A report once begun is told as a whole."""
        if not self._current:
            if not self._reports:
                return None
            self._current.extend(self._reports.popleft())
            self._size -= len(self._current)
            for event in self._current:
                if (event.type, event.code) in self._now:
                    self._told[event.type, event.code] = min(event.value, 1) if event.type == EV_KEY else event.value
        return self._current.popleft()
