"""Debian's libblkio, a front-end for disks without a virtual machine. QEMU's driver virtio-blk-vhost-user uses it.

Fetched and unpacked, not installed. The library needs nothing but a C library of 2021 or later.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from guest.debian.cache import PrepareError
from guest.debian.suites import open_suite

SUITE: Final = "trixie"  # Debian 12 has no package
LIBRARY: Final = "usr/lib/x86_64-linux-gnu/libblkio.so.1"
DRIVER: Final = b"virtio-blk-vhost-user"


class _Region(ctypes.Structure):
    _fields_ = [
        ("addr", c_void_p),
        ("iova", c_uint64),
        ("len", c_size_t),
        ("fd_offset", c_int64),
        ("fd", c_int),
        ("flags", c_uint32),
    ]


class _Completion(ctypes.Structure):
    _fields_ = [
        ("user_data", c_void_p),
        ("error_msg", c_char_p),
        ("reserved_", c_void_p),
        ("ret", c_int),
        ("reserved2_", ctypes.c_uint8 * 12),
    ]


@cache
def _library() -> Any:
    try:
        tree = open_suite(SUITE, print).unpack(["libblkio1"])
    except PrepareError as error:
        pytest.fail(str(error))
    library = ctypes.CDLL(str(tree.folder / LIBRARY))
    library.blkio_get_error_msg.restype = c_char_p
    library.blkio_get_queue.restype = c_void_p
    for name, *arguments in (
        ("blkio_create", c_char_p, POINTER(c_void_p)),
        ("blkio_set_str", c_void_p, c_char_p, c_char_p),
        ("blkio_set_int", c_void_p, c_char_p, c_int),
        ("blkio_get_uint64", c_void_p, c_char_p, POINTER(c_uint64)),
        ("blkio_get_bool", c_void_p, c_char_p, POINTER(c_bool)),
        ("blkio_connect", c_void_p),
        ("blkio_start", c_void_p),
        ("blkio_alloc_mem_region", c_void_p, POINTER(_Region), c_size_t),
        ("blkio_map_mem_region", c_void_p, POINTER(_Region)),
        ("blkio_get_queue", c_void_p, c_int),
        ("blkio_destroy", POINTER(c_void_p)),
        ("blkioq_read", c_void_p, c_uint64, c_void_p, c_size_t, c_void_p, c_uint32),
        ("blkioq_write", c_void_p, c_uint64, c_void_p, c_size_t, c_void_p, c_uint32),
        ("blkioq_discard", c_void_p, c_uint64, c_uint64, c_void_p, c_uint32),
        ("blkioq_write_zeroes", c_void_p, c_uint64, c_uint64, c_void_p, c_uint32),
        ("blkioq_flush", c_void_p, c_void_p, c_uint32),
        ("blkioq_do_io", c_void_p, POINTER(_Completion), c_int, c_int, c_void_p),
    ):
        getattr(library, name).argtypes = arguments
    return library


class Blkio:
    """A started disk with one region of memory of ``size`` bytes, from which and to which its data goes."""

    def __init__(self, handle: c_void_p, size: int, queues: int) -> None:
        self._lib = _library()
        self._handle = handle
        region = _Region()
        self._do("blkio_start")
        self._do("blkio_alloc_mem_region", byref(region), size)
        self._do("blkio_map_mem_region", byref(region))
        self._address = int(region.addr)
        self.memory = memoryview((ctypes.c_char * size).from_address(self._address)).cast("B")
        self._queues = [c_void_p(self._lib.blkio_get_queue(handle, index)) for index in range(queues)]

    def _do(self, name: str, *arguments: object) -> None:
        result = getattr(self._lib, name)(self._handle, *arguments)
        assert result >= 0, f"{name}: {self._lib.blkio_get_error_msg().decode()}"

    @property
    def capacity(self) -> int:
        value = c_uint64()
        self._do("blkio_get_uint64", b"capacity", byref(value))
        return value.value

    def ask(self, request: str, *arguments: int, queue: int = 0) -> None:
        """Put a request (read, write: offset in memory, start, length; discard, write_zeroes: start, length; flush)."""
        if request in ("read", "write"):
            at, start, length = arguments
            arguments = (start, self._address + at, length)
        getattr(self._lib, f"blkioq_{request}")(self._queues[queue], *arguments, None, 0)

    def done(self, count: int = 1, queue: int = 0) -> list[int]:
        """Wait until ``count`` requests are done; 0 or -errno of each."""
        completions = (_Completion * count)()
        got = self._lib.blkioq_do_io(self._queues[queue], completions, count, count, None)
        assert got == count, self._lib.blkio_get_error_msg().decode()
        return [completion.ret for completion in completions]


@contextmanager
def blkio(socket: Path, *, size: int = 1 << 20, queues: int = 1) -> Iterator[Blkio]:
    """libblkio connected to ``socket``."""
    library = _library()
    handle = c_void_p()
    assert library.blkio_create(DRIVER, byref(handle)) == 0
    try:
        for name, *arguments in (
            ("blkio_set_str", b"path", str(socket).encode()),
            ("blkio_connect",),
            ("blkio_set_int", b"num-queues", queues),
        ):
            result = getattr(library, str(name))(handle, *arguments)
            assert result == 0, f"{name}: {library.blkio_get_error_msg().decode()}"
        yield Blkio(handle, size, queues)
    finally:
        library.blkio_destroy(byref(handle))
