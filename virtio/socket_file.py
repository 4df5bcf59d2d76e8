"""A Unix socket that listens at a path: one way for the daemon, its devices and its transports.

What a dead daemon left is removed, permissions are right before anybody can connect, and at the end only the file goes
that was made here.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtio.errors import HostError
from virtio.remedies import with_remedy

BACKLOG: Final = 16
_PATH_MAX: Final = 107  # struct sockaddr_un, less the terminating zero


@dataclass(frozen=True, slots=True)
class Listen:
    """Create a socket at ``path`` and wait there. ``mode`` are its permission bits, ``group`` a name or None.

    ``kind`` is another one than a stream's where whole messages travel; ``backlog`` counts clients that wait to be let
    in.
    """

    path: Path
    mode: int = 0o600
    group: str | None = None
    kind: socket.SocketKind = socket.SOCK_STREAM
    backlog: int = BACKLOG


class SocketFile:
    """A listening Unix socket together with the file that is its address.

    The file is removed at the end only if it is still the one that was made here: another daemon may
    have put its own in the same place.
    """

    def __init__(self, listen: Listen) -> None:
        """``HostError`` if the address is in use, cannot be made, or is no socket; then nothing is left behind."""
        self.path: Final = listen.path
        group_id = -1 if listen.group is None else _group_id(listen.group)
        check_path(self.path)
        _remove_stale(self.path)
        self.socket: Final = socket.socket(socket.AF_UNIX, listen.kind | socket.SOCK_CLOEXEC)
        self._identity: tuple[int, int] | None = None
        try:
            self.socket.bind(os.fspath(self.path))
            self._identity = _identity(self.path)
            # Nobody can connect before listen(), so the permissions are right before they matter.
            if group_id != -1:
                os.chown(self.path, -1, group_id)
            self.path.chmod(listen.mode)
            self.socket.listen(listen.backlog)
        except OSError as error:
            self.close()
            raise _refused(self.path, "cannot listen there", error) from error

    def close(self) -> None:
        """Stop listening and remove the file, unless it is another's by now."""
        self.socket.close()
        if self._identity is not None and self._identity == _identity(self.path):
            self.path.unlink(missing_ok=True)
        self._identity = None


def check_path(path: Path) -> None:
    """``HostError`` if no Unix socket can have this path."""
    if len(os.fsencode(path)) > _PATH_MAX:
        raise HostError(
            f"{path}: a Unix socket's path has at most {_PATH_MAX} bytes; choose a shorter one",
            errno=errno.ENAMETOOLONG,
        )


def _refused(path: Path, what: str, error: OSError) -> HostError:
    number = error.errno or 0
    return HostError(with_remedy(f"{path}: {what}: {error.strerror}", path, number, writing=True), errno=number)


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise HostError(f"group {name!r} does not exist on this machine; create it or name another") from None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a daemon that is dead; ``HostError`` if it lives, or if the file is no socket.

    A datagram socket asks: the kernel answers "wrong type" where a stream socket is bound and "refused"
    where none is, and a daemon that lives never notices the question.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _refused(path, "cannot be looked at", error) from error
    if not stat.S_ISSOCK(status.st_mode):
        raise HostError(f"{path}: exists and is no socket; remove it or choose another path", errno=errno.EEXIST)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        result = probe.connect_ex(os.fspath(path))
    if result == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif result in (0, errno.EPROTOTYPE):
        raise HostError(
            f"{path}: another process listens there; stop it or choose another path", errno=errno.EADDRINUSE
        )
    elif result != errno.ENOENT:
        raise HostError(f"{path}: exists, and asking who owns it fails: {os.strerror(result)}", errno=result)
