"""Numbers of ioctls, put together as linux/ioctl.h does on x86 and ARM."""

from __future__ import annotations

import ctypes
import fcntl
import os

from virtio.errors import HostError

_WRITE = 1  # from us to the kernel
_READ = 2


def ior(kind: int, number: int, size: int) -> int:
    """``_IOR``: the kernel fills ``size`` bytes."""
    return _ioc(_READ, kind, number, size)


def iow(kind: int, number: int, size: int) -> int:
    """``_IOW``: the kernel reads ``size`` bytes."""
    return _ioc(_WRITE, kind, number, size)


def iowr(kind: int, number: int, size: int) -> int:
    """``_IOWR``: both."""
    return _ioc(_READ | _WRITE, kind, number, size)


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


def call(fd: int, request: int, argument: bytes, what: str) -> bytes:
    """``argument`` as the kernel leaves it; ``HostError``, which begins with ``what``, when it refuses."""
    return call_with_result(fd, request, argument, what)[1]


def call_with_result(fd: int, request: int, argument: bytes, what: str) -> tuple[int, bytes]:
    """``call`` of an ioctl that answers with a number too."""
    # A ctypes buffer, because fcntl.ioctl copies no more than 1024 bytes of anything else that it may change.
    buffer = ctypes.create_string_buffer(argument, len(argument))
    try:
        result = fcntl.ioctl(fd, request, buffer)
    except OSError as error:
        raise HostError(f"{what}: {os.strerror(error.errno or 0)}", errno=error.errno or 0) from error
    return result, buffer.raw
