"""Owned file descriptors: every received fd is wrapped *before* anything about it is checked."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Final

import structlog

from virtio.errors import HostError


def eventfd_id(fd: int) -> int | None:
    """The kernel's number of the eventfd behind ``fd``, alike for all its duplicates while one of them is open.

    ``None`` when ``fd`` is no eventfd, or on a kernel before 5.2, which does not tell (proc(5), fdinfo).
    """
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "eventfd-id":
            return int(value)
    return None


CLOSERS_MAX: Final = 16
"""Threads that may be waiting for file systems to let go of a file."""

_F_GET_SEALS: Final = 1034  # linux/fcntl.h; Python has no name for it before 3.13
_closers = threading.BoundedSemaphore(CLOSERS_MAX)


def may_block(fd: int) -> bool:
    """Whether to ask, map or close the file behind ``fd`` may mean to wait for somebody else. Never waits itself.

    Closing a file of FUSE or NFS waits for its server (flush). Only files of tmpfs and hugetlbfs have seals.
    """
    try:
        fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        try:
            return Path(f"/proc/self/fd/{fd}").readlink().is_absolute()  # not "socket:[1]", "anon_inode:[eventfd]"
        except OSError:
            return True
    return False


class OwnedFd:
    """One file descriptor with exactly one owner.

    Closing twice is harmless; using it after ``close`` or ``detach`` raises ``ValueError``.
    The file status flags of a received fd are shared with the sender, so nothing here sets them.
    ``may_block``: a thread closes it, for that may take its time.
    """

    __slots__ = ("_fd", "may_block")

    def __init__(self, fd: int, *, may_block: bool = False) -> None:
        if fd < 0:
            raise ValueError(f"not a file descriptor: {fd}")
        self._fd = fd
        self.may_block = may_block

    def fileno(self) -> int:
        """The descriptor's number; still owned by this object."""
        if self._fd < 0:
            raise ValueError("file descriptor is closed")
        return self._fd

    def detach(self) -> int:
        """Give up ownership: the caller must close the number returned."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def duplicate(self) -> OwnedFd:
        """A second descriptor (close-on-exec) of the same open file. ``HostError``: there is none left."""
        try:
            return OwnedFd(os.dup(self.fileno()), may_block=self.may_block)
        except OSError as error:
            raise HostError(f"no second descriptor: {error.strerror}", errno=error.errno or 0) from error

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self.may_block:
                _close_elsewhere(fd)
            else:
                os.close(fd)

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})" if self._fd >= 0 else "OwnedFd(closed)"


def take_count(fd: int) -> int:
    """How often a non-blocking eventfd was rung since the last time: 0 where somebody else has read it meanwhile.

    What is waited for may be gone when the task that waited runs: readiness is a hint.
    """
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def _close_elsewhere(fd: int) -> None:
    def close() -> None:
        try:
            os.close(fd)
        except OSError:  # what could not be written back; the descriptor is gone all the same
            pass
        finally:
            _closers.release()

    if _closers.acquire(blocking=False):
        threading.Thread(target=close, name="close", daemon=True).start()
    else:
        structlog.get_logger().error("a file stays open: the file systems of others before it have not let go")
