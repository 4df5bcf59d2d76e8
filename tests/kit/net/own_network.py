"""A network namespace for one test: what is made in it is gone afterwards, and nobody else sees it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def enter_network(namespace: int) -> None:
    """This thread goes to the network of that file descriptor."""
    _call("setns", namespace, CLONE_NEWNET)


@contextmanager
def own_network() -> Iterator[None]:
    """This thread is in a network of its own inside the block. Skips where that may not be, or there is no tun."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun")
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            _call("unshare", CLONE_NEWNET)
        except PermissionError as error:
            pytest.skip(f"no network namespace of our own: {error}")
        try:
            # Or else the kernel speaks first on every new interface.
            ipv6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
            if ipv6.exists():
                ipv6.write_text("1")
            yield
        finally:
            enter_network(before)
    finally:
        os.close(before)
