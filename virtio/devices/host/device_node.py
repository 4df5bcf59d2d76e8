"""Opening a character device of the host, with advice where it cannot be had."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from virtio.errors import HostError
from virtio.fd import OwnedFd


def open_node(path: Path, what: str, *, missing: str, forbidden: str, flags: int = 0) -> OwnedFd:
    """``path``, open for reading and writing. ``HostError`` begins with ``what`` and ends with the advice that fits:
    ``missing`` where there is no such file, ``forbidden`` where we may not open it."""
    try:
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC | flags))
    except OSError as error:
        advice = {errno.ENOENT: f"; {missing}", errno.EACCES: f"; {forbidden}"}.get(error.errno or 0, "")
        raise HostError(f"{what}: {os.strerror(error.errno or 0)}{advice}", errno=error.errno or 0) from error
