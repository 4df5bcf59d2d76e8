"""The Python face of the native block device: what is set once, and what may change later."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from virtio.dataplane import check, ffi, lib
from virtio.errors import HostError
from virtio.fd import OwnedFd

SEG_MAX: Final[int] = lib.BLK_SEG_MAX
DISCARD_SEGMENTS: Final[int] = lib.BLK_DISCARD_SEGMENTS
OPS: Final = ("read", "write", "flush", "discard", "write_zeroes", "get_id", "other")
SECTOR_SIZE: Final = 512


class DiskBackend(IntEnum):
    """Where the bytes are."""

    NULL = lib.BLK_BACKEND_NULL
    MEMORY = lib.BLK_BACKEND_MEMORY
    FILE = lib.BLK_BACKEND_FILE
    BLOCK_DEVICE = lib.BLK_BACKEND_BLOCK_DEVICE


@dataclass(frozen=True, slots=True)
class DirectIo:
    """Direct I/O on this host: what buffers (``memory_align``), offsets and lengths (``offset_align``) are aligned to.

    ``cached_fd``: the same file through the page cache, for the block in which an image ends; needed where
    ``offset_align`` is more than the disk's block size.
    """

    memory_align: int
    offset_align: int
    cached_fd: OwnedFd | None = None


@dataclass(frozen=True, slots=True)
class DiskSetup:
    """What a native disk is made of. ``capacity`` in 512-byte sectors; ``serial`` up to 20 bytes (5.2.6, GET_ID)."""

    backend: DiskBackend
    capacity: int
    fd: OwnedFd | None
    block_size: int
    direct: DirectIo | None
    read_only: bool
    discard: bool
    write_zeroes: bool
    max_discard_sectors: int
    max_write_zeroes_sectors: int
    serial: bytes
    erase_align: int = 1
    """What a discard is aligned to, or the storage refuses it."""
    stop_on_error: bool = False
    """Keep the requests that the storage fails, and what comes after them, until they are tried again."""
    news_fd: OwnedFd | None = None
    """An eventfd, written when there is an error that ``errors`` has not reported yet."""
    queues: int = 1
    """Its queues, which share the requests that it may have in flight."""


FILE_ENDED: Final = "ENDED"
"""In place of an errno's name: the file ends before the disk does."""


@dataclass(frozen=True, slots=True)
class DiskErrors:
    """What the storage answered so far: how often by operation (of ``OPS``) and errno, and the failed flush's errno."""

    counts: dict[tuple[str, str], int]
    flush_failed: str | None
    reopened: int = 0
    stopped: tuple[str, str] | None = None
    """Operation and errno: requests are kept since one was answered so."""
    kept: int = 0
    retries: int = 0


def errno_name(number: int) -> str:
    """``ENOSPC``; what Linux does not know is its number."""
    return FILE_ENDED if number == lib.BLK_FILE_ENDED else errno.errorcode.get(number, str(number))


class NativeDevice:
    """A device that a worker serves without Python. ``pointer`` is its C struct."""

    pointer: Any


class NativeDisk(NativeDevice):
    """A disk in the data plane. It keeps a duplicate of the image's fd, and with it the image's lock."""

    def __init__(self, setup: DiskSetup) -> None:
        raw = ffi.new("struct blk_setup *")
        raw.backend, raw.capacity, raw.block_size = int(setup.backend), setup.capacity, setup.block_size
        raw.queues = setup.queues
        raw.fd = setup.fd.fileno() if setup.fd is not None else -1
        raw.read_only = setup.read_only
        raw.cached_fd, raw.erase_align = -1, setup.erase_align
        if setup.direct is not None:
            raw.direct, raw.memory_align, raw.offset_align = True, setup.direct.memory_align, setup.direct.offset_align
            raw.cached_fd = setup.direct.cached_fd.fileno() if setup.direct.cached_fd is not None else -1
        raw.discard, raw.write_zeroes = setup.discard, setup.write_zeroes
        raw.max_discard_sectors = setup.max_discard_sectors
        raw.max_write_zeroes_sectors = setup.max_write_zeroes_sectors
        raw.serial = setup.serial[:20]
        raw.inline_io = setup.fd is not None and setup.direct is None and file_is_memory(setup.fd)
        raw.stop_on_error = setup.stop_on_error
        raw.news_fd = setup.news_fd.fileno() if setup.news_fd is not None else -1
        error = ffi.new("int *")
        pointer = lib.blk_new(raw, error)
        if pointer == ffi.NULL:
            check(error[0], "making a disk")
            raise HostError("making a disk failed")
        self.pointer = ffi.gc(pointer, lib.native_device_unref)

    def _alive(self) -> Any:
        if self.pointer == ffi.NULL:
            raise ValueError("the disk is closed")
        return self.pointer

    def set_capacity(self, sectors: int) -> None:
        """The image was resized; requests beyond the new end fail from now on."""
        lib.blk_set_capacity(self._alive(), sectors)

    def use_sync_fds(self, fds: Sequence[OwnedFd]) -> None:
        """Further open file descriptions of the image, before its first queue runs: each worker syncs by its own."""
        if fds:
            numbers = [fd.fileno() for fd in fds]
            check(lib.blk_use_sync_fds(self._alive(), numbers, len(numbers)), "preparing a disk's flushes")
            for fd in fds:
                fd.detach()

    def errors(self) -> DiskErrors:
        """Any thread."""
        raw = lib.blk_errors(self._alive())
        counts = {
            (op, errno_name(number)): count
            for place, op in enumerate(OPS)
            for number, count in enumerate(raw.counts[place])
            if count
        }
        failed = errno_name(raw.sync_error) if raw.sync_error else None
        stopped = (OPS[raw.stop_op], errno_name(raw.stop_error)) if raw.stopped else None
        return DiskErrors(counts, failed, raw.reopened, stopped, raw.kept, raw.retries)

    def retry(self) -> None:
        """Try again what is kept of a stopped disk."""
        lib.blk_retry(self._alive())

    def installer(self) -> Callable[[OwnedFd, OwnedFd | None, Sequence[OwnedFd]], None]:
        """Puts new open file descriptions of the image in the place of those in use, after which flushes may succeed.

        To be called in a thread, for it closes files. The disk may be closed meanwhile. The arguments: the first
        description, one without O_DIRECT where there is one, and as many as ``use_sync_fds`` had.
        """
        pointer = self._alive()

        def install(first: OwnedFd, cached: OwnedFd | None, others: Sequence[OwnedFd]) -> None:
            numbers = [fd.fileno() for fd in others]
            cached_number = cached.fileno() if cached is not None else -1
            check(lib.blk_reopened(pointer, first.fileno(), cached_number, numbers, len(numbers)), "opening it again")

        return install

    def await_news(self) -> None:
        """The next error writes ``news_fd`` again; call it before ``errors``, so that none is missed."""
        lib.blk_await_news(self._alive())

    def set_writeback(self, on: bool) -> None:
        """The driver's cache mode (5.2.5.2): off means that a write is durable before it is answered."""
        lib.blk_set_writeback(self._alive(), on)

    def accept(self, *, discards: bool, zeroes: bool, legacy: bool) -> None:
        """What the driver accepted: requests of a kind that was not accepted are unsupported.

        ``legacy``: the driver did not accept VIRTIO_F_VERSION_1 and may use the request types of that time.
        """
        lib.blk_accept(self._alive(), discards, zeroes, legacy)

    def close(self) -> None:
        """Let go of the disk, and so of the image and its lock; a worker in the middle of a request does so later."""
        self.pointer = ffi.NULL


def direct_alignment(fd: OwnedFd) -> tuple[int, int]:
    """What direct I/O on this file is aligned to on this host: memory, and offsets and lengths."""
    memory, offset = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    check(lib.blk_direct_alignment(fd.fileno(), memory, offset), "looking at the image's direct I/O")
    return memory[0], offset[0]


def file_is_memory(fd: OwnedFd) -> bool:
    """True for files on tmpfs and ramfs: their I/O is a copy and needs no asynchrony."""
    return bool(check(lib.blk_file_inline(fd.fileno()), "looking at the image's file system"))
