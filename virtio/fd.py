"""Owned file descriptors: every received fd is wrapped *before* anything about it is checked."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

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


class OwnedFd:
    """One file descriptor with exactly one owner.

    Closing twice is harmless; using it after ``close`` or ``detach`` raises ``ValueError``.
    The file status flags of a received fd are shared with the sender, so nothing here sets them.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"not a file descriptor: {fd}")
        self._fd = fd

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
            return OwnedFd(os.dup(self.fileno()))
        except OSError as error:
            raise HostError(f"no second descriptor: {error.strerror}", errno=error.errno or 0) from error

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
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
