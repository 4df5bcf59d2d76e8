"""How a vhost-user device meets its front-end: it listens, connects, or is given a socket."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.socket_file import Listen


@dataclass(frozen=True, slots=True)
class Connect:
    """Connect to the front-end that listens at ``path``, again and again while there is none."""

    path: Path


@dataclass(frozen=True, slots=True)
class Inherit:
    """A socket somebody else made: a listening one, or one that is connected to the front-end already."""

    fd: OwnedFd


Endpoint = Listen | Connect | Inherit


def connect_unix(path: Path) -> socket.socket:
    """A socket connected to ``path``; ``OSError`` if nobody takes the connection at once."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return sock


def inherited_socket(fd: OwnedFd) -> socket.socket:
    """The Unix stream socket in ``fd`` (taken); ``HostError`` if it is something else."""
    try:
        sock = socket.socket(fileno=fd.fileno())
    except OSError as error:
        number = fd.fileno()
        fd.close()
        raise HostError(f"file descriptor {number} is no socket", errno=error.errno or 0) from error
    number = fd.detach()
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise HostError(f"file descriptor {number} is no Unix stream socket", errno=errno.EINVAL)
    return sock


def is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
