"""A device whose code keeps the event loop to itself for long holds up every other device: a warning names it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog
import trio

from virtio.backend.device_calls import DEVICE

LONG_SECONDS: Final = 0.5
"""A step, from one await that waits to the next, of so many seconds is reported; a busy host alone takes less."""
SILENT_SECONDS: Final = 60.0
"""How long a device that was reported is not reported again."""

log = structlog.get_logger()


class SlowSteps(trio.abc.Instrument):
    """An instrument of ``trio.run``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = 0.0
        self._told: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = self._clock()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        now = self._clock()
        if now - self._began >= LONG_SECONDS:
            self._tell(task, now)

    def _tell(self, task: trio.lowlevel.Task, now: float) -> None:
        device = task.context.get(DEVICE)
        if device is None:
            return
        if device in self._told and now - self._told[device] < SILENT_SECONDS:
            self._unsaid[device] = self._unsaid.get(device, 0) + 1
            return
        self._told[device] = now
        log.warning(
            "a device keeps the event loop to itself: what blocks belongs in trio.to_thread.run_sync",
            device=device,
            seconds=round(now - self._began, 3),
            where=task.name,
            unreported=self._unsaid.pop(device, 0),
        )
