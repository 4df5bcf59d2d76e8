"""The link at a path that leads to a pseudo terminal, and whether the daemon that made one still runs.

The kernel gives the number of a pseudo terminal away as soon as it is free. After a daemon was killed, the number in
its link may therefore be anybody's: another device's, another daemon's, or that of the very terminal that is opened
for this path now. So the terminal itself says which path it serves: its owner holds a lock on one byte of it, and the
byte's offset is made from the path. The kernel releases the lock when the owner ends, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from pathlib import Path
from typing import Final

from virtio.errors import HostError
from virtio.fd import OwnedFd

_FLOCK: Final = struct.Struct("@hhqqi0q")
"""struct flock of fcntl(2): l_type, l_whence, l_start, l_len, l_pid."""


def remove_stale_link(path: Path) -> None:
    """Remove the link that a killed daemon left at ``path``. Call it before the new terminal is opened.

    ``HostError``: a daemon or device that runs serves ``path``, or the link does not lead to a pseudo terminal.
    """
    if not path.is_symlink():
        return
    target = str(path.readlink())
    if not target.startswith("/dev/pts/"):
        raise HostError(f"console pty {path}: it is a link to {target}; remove it or choose another path")
    try:
        terminal = OwnedFd(os.open(target, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        pass  # gone, or somebody else's terminal
    else:
        with terminal:
            if _is_claimed(terminal.fileno(), path):
                raise HostError(f"console pty {path}: another device or daemon is using it")
    path.unlink()


def claim(terminal: int, path: Path) -> None:
    """Say that the terminal serves ``path``, for as long as this process has it open."""
    fcntl.fcntl(terminal, fcntl.F_OFD_SETLK, _lock_of(path))


def _is_claimed(terminal: int, path: Path) -> bool:
    found: bytes = fcntl.fcntl(terminal, fcntl.F_OFD_GETLK, _lock_of(path))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _lock_of(path: Path) -> bytes:
    """The lock of one byte whose offset stands for ``path``, by whatever name its folder goes."""
    whole = os.fsencode(os.path.realpath(path.parent) + "/" + path.name)
    offset = int.from_bytes(hashlib.sha256(whole).digest()[:8]) >> 2
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
