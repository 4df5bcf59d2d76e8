"""Opening a character device of the host, with advice where it cannot be had."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.remedies import with_remedy


def open_node(path: Path, what: str, *, missing: str, forbidden: str, flags: int = 0) -> OwnedFd:
    """``path``, open for reading and writing. ``HostError`` begins with ``what`` and ends with the advice that fits:
    ``missing`` where there is no such file, ``forbidden`` where we may not open it."""
    try:
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC | flags))
    except OSError as error:
        number = error.errno or 0
        text = f"{what}: {os.strerror(number)}"
        advice = {errno.ENOENT: f"; {missing}", errno.EACCES: f"; {forbidden}"}.get(number)
        text = text + advice if advice is not None else with_remedy(text, path, number, writing=True)
        raise HostError(text, errno=number) from error
