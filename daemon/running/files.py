"""What the daemon does to files while it runs: in threads with a limit, for the file system may hang.

Each device has one such thread at most. An image that hangs delays neither the event loop nor another device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
import trio

from config.made import paths_in
from virtio.backend.device_calls import close_all
from virtio.device import Device
from virtio.errors import HostError

FILES_SECONDS: Final = 10.0  # how long a file system may take

T = TypeVar("T")


class NoAnswerError(Exception):
    """The limit has passed."""


class Files:
    """``seconds``: the limit of each piece of work, unless it has its own."""

    def __init__(self, seconds: float = FILES_SECONDS) -> None:
        self.seconds: Final = seconds
        self._limiters: dict[str, trio.CapacityLimiter] = {}
        self._working: dict[object, tuple[str, str, float]] = {}  # owner, file, since when

    async def run(
        self,
        owner: str,
        work: Callable[[], T],
        late: Callable[[T], object] | None = None,
        *,
        seconds: float | None = None,
        path: Path | None = None,
    ) -> T:
        """What ``work`` returns or raises in the thread of the device ``owner``, or ``NoAnswerError``. It is about
        ``path``.

        A result that comes after the limit, or after this task was cancelled, is given to ``late``, in a thread.
        """
        limiter = self._limiters.setdefault(owner, trio.CapacityLimiter(1))
        lock, results, is_abandoned = threading.Lock(), list[T](), False

        def in_thread() -> None:
            self._working[lock] = owner, str(path or "a file"), time.monotonic()
            try:
                result = work()
            finally:
                del self._working[lock]
            with lock:
                if not is_abandoned:
                    results.append(result)
                    return
            if late is not None:
                late(result)

        try:
            with trio.move_on_after(self.seconds if seconds is None else seconds):
                await trio.to_thread.run_sync(in_thread, abandon_on_cancel=True, limiter=limiter)
        except trio.Cancelled:
            with lock:
                is_abandoned = True
            if results and late is not None:
                threading.Thread(target=late, args=results, daemon=True).start()
            raise
        with lock:
            is_abandoned = True
        if not results:
            raise NoAnswerError
        return results[0]

    async def open(self, owner: str, path: Path | None, make: Callable[[], Device]) -> Device:
        """The device that ``make`` opens; one that comes too late is closed. ``HostError`` names ``path``."""
        try:
            return await self.run(owner, make, lambda device: close_all([device]), path=path)
        except NoAnswerError:
            raise HostError(self.no_answer(path)) from None

    async def close(self, device: Device) -> None:
        """Close ``device``, also when this task is cancelled. A new one is not opened before the old one is closed."""
        if not device.files_may_hang:
            close_all([device])
            return
        # Whatever of the old device still hangs must not keep its files from being closed.
        self._limiters[device.name] = trio.CapacityLimiter(1)
        try:
            with trio.CancelScope(shield=True):
                await self.run(device.name, partial(close_all, [device]), path=path_of(device.options))
        except NoAnswerError:
            structlog.get_logger().error(
                "not closed yet: its storage has not answered",
                device=device.name,
                path=str(path_of(device.options)),
                seconds=self.seconds,
            )

    def waiting(self) -> list[str]:
        """What threads wait for, now: whose, which file, how long."""
        now = time.monotonic()
        working = [*self._working.values()]
        return [f"{owner}: {path} has not answered for {now - since:.0f} s" for owner, path, since in working]

    def no_answer(self, path: Path | None) -> str:
        return no_answer(path, self.seconds)


def no_answer(path: Path | None, seconds: float) -> str:
    return f"{path or 'a file'}: the file system has not answered for {seconds:.0f} s"


def path_of(options: Any) -> Path | None:
    """The file that a device's options name; of several the first."""
    return next((path for _, path in paths_in(options)), None)
