"""What an operator reads in the log of a disk whose storage fails, and of an image that was cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
import trio

from virtio.devices.blk.storage_log import Kind, StorageLog, explain
from virtio.errors import HostError
from virtio.fd import OwnedFd, take_count
from virtio.native.disk import FILE_ENDED, DiskErrors, NativeDisk

LOOK_SECONDS: Final = 10.0
"""How long the file system may take to say how long a file is."""

RETRY_SECONDS_MIN = 1.0
"""A stopped disk tries again after so long, then after twice as long, ..."""
RETRY_SECONDS_MAX: Final = 60.0

_CUT: Final[Kind] = ("any", FILE_ENDED)


class StorageWatch:
    """Reports the errors of ``disk``, which writes ``news`` when there is one.

    ``look``: in a thread, the capacity of the disk and the size of its image in bytes. ``failed_before``: the errno of
    the flush that failed before the image was opened again with this disk, or ``None``.
    """

    def __init__(
        self, name: str, disk: NativeDisk, news: OwnedFd, look: Callable[[], tuple[int, int]], failed_before: str | None
    ) -> None:
        self._disk = disk
        self._news = news
        self._look = look
        self._log = structlog.get_logger().bind(device=name)
        self._book = StorageLog()
        self._looking = trio.CapacityLimiter(1)
        self._flush_failed: str | None = failed_before
        self._stopped_at: float | None = None
        self._retries = 0  # before it stopped
        self._retry_at = math.inf
        self._delay = RETRY_SECONDS_MIN
        self._reopened = -1 if failed_before is not None else 0

    async def run(self) -> None:
        while True:
            await self._report(self._disk.errors())
            with trio.move_on_after(max(0.0, min(self._book.due(), self._retry_at - trio.current_time()))):
                await trio.lowlevel.wait_readable(self._news.fileno())
                take_count(self._news.fileno())
            if trio.current_time() >= self._retry_at:
                self._disk.retry()
                self._delay = min(2 * self._delay, RETRY_SECONDS_MAX)
                self._retry_at = trio.current_time() + self._delay
            self._disk.await_news()

    async def _report(self, errors: DiskErrors) -> None:
        for values in self._book.lines(_cuts_as_one(errors.counts)):
            if values["errno"] == FILE_ENDED:
                await self._report_cut(values["times"])
            else:
                self._log.error("storage failed", **values)
        self._report_stop(errors)
        if errors.reopened != self._reopened:
            self._reopened = errors.reopened
            if self._flush_failed is not None:
                self._log.warning(
                    "the image was opened again and flushes may succeed: what was lost before stays lost",
                    error=explain(self._flush_failed),
                    errno=self._flush_failed,
                )
            self._flush_failed = None
        if errors.flush_failed is not None and self._flush_failed is None:
            self._log.critical(
                "what the guest has written may be lost: every flush fails until the image is opened again",
                error=explain(errors.flush_failed),
                errno=errors.flush_failed,
                hint="repair the storage, then: hyperbell reopen (docs/devices/blk.md)",
            )
        self._flush_failed = errors.flush_failed

    def _report_stop(self, errors: DiskErrors) -> None:
        if errors.stopped is not None and self._stopped_at is None:
            op, name = errors.stopped
            self._log.error(
                "the disk is stopped: its requests wait until the storage takes them",
                op=op,
                errno=name,
                error=explain(name),
                hint="it is tried again by itself, and at: hyperbell retry (docs/devices/blk.md)",
            )
            self._stopped_at = trio.current_time()
            self._retries = errors.retries
            self._delay = RETRY_SECONDS_MIN
            self._retry_at = self._stopped_at + self._delay
        elif errors.stopped is None and self._stopped_at is not None:
            seconds = round(trio.current_time() - self._stopped_at, 1)
            self._log.warning("the disk continues", seconds=seconds, retries=errors.retries - self._retries)
            self._stopped_at = None
            self._retry_at = math.inf

    async def _report_cut(self, times: int) -> None:
        """Requests found the end of the file before that of the disk."""
        sizes: dict[str, Any] = {}
        with trio.move_on_after(LOOK_SECONDS):
            try:
                capacity, size = await trio.to_thread.run_sync(
                    self._look, abandon_on_cancel=True, limiter=self._looking
                )
                sizes = {"bytes_before": capacity, "bytes_now": size}
            except (HostError, OSError) as error:
                sizes = {"error": str(error)}
        self._log.error(
            "the image is shorter than the disk: it was cut while it was served, and its guest gets errors there",
            errno=FILE_ENDED,
            times=times,
            **sizes,
        )


def _cuts_as_one(counts: Mapping[Kind, int]) -> Mapping[Kind, int]:
    """Whatever request found the end of the file: it is one thing that happened."""
    merged = {kind: count for kind, count in counts.items() if kind[1] != FILE_ENDED}
    if cuts := sum(count for (_, name), count in counts.items() if name == FILE_ENDED):
        merged[_CUT] = cuts
    return merged
