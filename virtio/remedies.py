"""What an operator can do about a file that cannot be opened: the remedy depends on who closed it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

_HOMES: Final = ("/home", "/root", "/run/user")
_DROP_IN: Final = "in a drop-in (systemctl edit hyperbell)"


def in_a_unit() -> bool:
    """Whether systemd started this process: then a unit's settings may hide files or make them read-only."""
    return "INVOCATION_ID" in os.environ


def remedy(path: Path, number: int, *, writing: bool, read_only_key: bool = False) -> str:
    """What to do when opening ``path`` gave errno ``number``; "" where nothing is known.

    ``writing``: it was opened to be written, or is to be made; ``read_only_key``: which ``read_only = true`` would
    not do.
    """
    at_home = any(path.is_relative_to(home) for home in _HOMES)
    if in_a_unit() and at_home and number in (errno.EACCES, errno.ENOENT, errno.EROFS):
        return (
            "the unit hides homes (ProtectHome=yes): choose a place below /var/lib/hyperbell, or set ProtectHome=no "
            f"and ReadWritePaths={path.parent} {_DROP_IN}"
        )
    or_read = ", or set read_only = true" if writing and read_only_key else ""
    if number == errno.EROFS and in_a_unit():
        where = f"ReadWritePaths={path.parent} {_DROP_IN}"
        return f"the unit makes it read-only (ProtectSystem=strict): set {where}{or_read}"
    if number == errno.EROFS:
        return f"its file system is mounted read-only: mount it writable{or_read}"
    if number == errno.EPERM and _is_device(path):
        where = _DROP_IN if in_a_unit() else "in the service's unit"
        return f"the unit has no access to the device: set DeviceAllow={path} {'rw' if writing else 'r'} {where}"
    if number in (errno.EACCES, errno.EPERM):
        return f"give the daemon's user {'write' if writing else 'read'} access{or_read}{_closed_folder(path)}"
    return ""


def with_remedy(text: str, path: Path, number: int, *, writing: bool, read_only_key: bool = False) -> str:
    """``text``, with the remedy behind it where there is one."""
    help_for = remedy(path, number, writing=writing, read_only_key=read_only_key)
    return f"{text}; {help_for}" if help_for else text


def _is_device(path: Path) -> bool:
    try:
        return path.is_block_device() or path.is_char_device()
    except OSError:
        return False


def _closed_folder(path: Path) -> str:
    """A folder on the way that this user may not pass, if that is what is closed."""
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK):
            return f"; the folder {folder} is closed to it"
    return ""
