"""Calls into a device's own code: what fails there is the device's mistake, and costs no other device anything.

A device may come from anybody (docs/device-contract.md). Each of its mistakes is logged once, with its traceback. The
daemon continues, because it serves other guests' devices too. ``SystemExit`` does not end it either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import structlog
import trio

from virtio.device import Device
from virtio.errors import HostError, HyperbellError

log = structlog.get_logger()

MISTAKES: Final = (Exception, SystemExit)
"""What a device may raise by mistake. ``KeyboardInterrupt`` and ``trio.Cancelled`` are others' wishes, and pass."""

T = TypeVar("T")

DEVICE: Final[ContextVar[str]] = ContextVar("DEVICE")
"""The device that a task, and every task that it starts, works for."""


class DeviceCalls:
    """How the backend of ``device`` calls it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._told: set[str] = set()

    def tell(self, what: str, error: BaseException, **where: Any) -> None:
        """One traceback for each method: a guest can make most of them fail as often as it likes."""
        if what in self._told:
            return
        self._told.add(what)
        log.error("device failed", device=self._device.name, where=what, exc_info=error, **where)

    def go_on(self, what: str, call: Callable[[], object], **where: Any) -> bool:
        """Call; False when it raised, whatever it was: what has begun goes on without it."""
        try:
            call()
        except MISTAKES as error:
            self.tell(what, error, **where)
            return False
        return True

    async def go_on_async(self, what: str, call: Callable[[], Awaitable[object]], **where: Any) -> bool:
        try:
            await call()
        except BaseExceptionGroup as group:  # of a nursery in there
            mistakes, others = group.split(MISTAKES)
            if mistakes is not None:
                self.tell(what, mistakes, **where)
            if others is not None:
                raise others from None
            return False
        except MISTAKES as error:
            self.tell(what, error, **where)
            return False
        return True

    async def run(self, task_status: trio.TaskStatus[None]) -> bool:
        """The device's ``run``; False when it raised after it had begun. Before that it is the caller's to tell."""
        started, failed = False, False
        DEVICE.set(self._device.name)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._device.run)
                started = True
                task_status.started()
        except* MISTAKES as group:
            if not started:
                if group.subgroup(SystemExit) is not None:  # which would end the daemon without a word
                    raise HostError(f"the device's run() ended the program: {group.exceptions[0]!r}") from group
                raise
            failed = True
            self.tell("run", group)
        return not failed

    def reset(self) -> None:
        """As at a driver's reset, after which it has accepted nothing."""
        self.go_on("set_driver_features", lambda: self._device.set_driver_features(0))
        self.go_on("reset", self._device.reset)

    def look(self, what: str, call: Callable[[], T], otherwise: T) -> T:
        """What the device says; ``otherwise`` when it raises. Any thread."""
        try:
            return call()
        except MISTAKES as error:
            self.tell(what, error)
            return otherwise

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """What the device says, or the ``HyperbellError`` that it raises; ``HostError`` for whatever else it does."""
        try:
            return call()
        except HyperbellError:
            raise
        except MISTAKES as error:
            self.tell(what, error)
            raise HostError(f"the device's {what}() failed: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def close_all(devices: Iterable[Device]) -> None:
    """Close all of ``devices``, whatever one of them raises."""
    for device in devices:
        DeviceCalls(device).go_on("close", device.close)
