"""Opening a disk image: one writer, never a guess about its format, and what the file says of its geometry."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.native.disk import DirectIo, direct_alignment
from virtio.remedies import remedy

_BLKGETSIZE64 = 0x80081272
_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKIOMIN = 0x1278
_BLKIOOPT = 0x1279

WRITE_PROTECTED: Final = "the block device is read-only; set read_only = true"
_NO_DIRECT_IO: Final = "this file system has no direct I/O (tmpfs, for one); leave out direct = true"

# struct flock of Linux on 64 bits: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class Image:
    """An opened image. Sizes in bytes; ``minimum_io`` and ``optimal_io`` 0: nothing known."""

    fd: OwnedFd
    is_block_device: bool
    direct: DirectIo | None
    erase_align: int
    minimum_io: int
    optimal_io: int

    def size(self) -> int:
        """Its size now: files and block devices may be resized while they are served."""
        return size_of(self.fd)

    def close(self) -> None:
        self.fd.close()
        if self.direct is not None and self.direct.cached_fd is not None:
            self.direct.cached_fd.close()


def size_of(fd: OwnedFd) -> int:
    """The size of a regular file or a block device in bytes."""
    about = os.fstat(fd.fileno())
    return _ioctl(fd.fileno(), _BLKGETSIZE64, "Q") if stat.S_ISBLK(about.st_mode) else about.st_size


def is_write_protected(fd: OwnedFd) -> bool:
    """Whether ``fd`` is a block device that takes no writes; the kernel opens one for writing all the same."""
    return stat.S_ISBLK(os.fstat(fd.fileno()).st_mode) and bool(_ioctl(fd.fileno(), _BLKROGET, "i"))


def open_image(path: Path, *, read_only: bool, direct: bool, block_size: int = 512) -> Image:
    """Open and lock the raw image at ``path``; ``HostError`` says what is in the way and what to do.

    ``block_size``: of the disk, whatever direct I/O takes on this host.

    The lock is an open-file-description lock on the whole file, exclusive for a writer and shared for readers, so
    two daemons (or two devices) never write one file. It lasts until the last duplicate of the fd is closed.
    """
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        fd = OwnedFd(os.open(path, flags | os.O_NONBLOCK))  # O_NONBLOCK: a fifo must not hold us up
    except OSError as error:
        raise HostError(_open_trouble(path, error, read_only, direct), errno=error.errno or 0) from error
    try:
        mode = os.fstat(fd.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise HostError(f"{path}: neither a regular file nor a block device")
        if not read_only and is_write_protected(fd):
            raise HostError(f"{path}: {WRITE_PROTECTED}", errno=errno.EROFS)
        _lock(fd, path, read_only)
        return _examine(fd, path, read_only, direct, block_size)
    except BaseException:
        fd.close()
        raise


def open_again(image: Image, path: Path | None, *, direct: bool = True) -> OwnedFd:
    """Another open file description of the file that ``image`` is, whatever lies at ``path`` by now; not locked.

    ``direct`` False: one that goes through the page cache in any case.
    """
    number = image.fd.fileno()
    flags = fcntl.fcntl(number, fcntl.F_GETFL) & (os.O_ACCMODE | (os.O_DIRECT if direct else 0))
    try:
        return OwnedFd(os.open(f"/proc/self/fd/{number}", flags | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        raise HostError(f"{path}: opening it once more: {error.strerror}", errno=error.errno or 0) from error


def _open_trouble(path: Path, error: OSError, read_only: bool, direct: bool) -> str:
    reason = os.strerror(error.errno or 0)
    help_for = remedy(path, error.errno or 0, writing=not read_only, read_only_key=True)
    if error.errno == errno.ENOENT and not help_for:
        return f"{path}: {reason}; make it first, for instance: truncate -s 10G {path}"
    if error.errno == errno.EINVAL and direct:
        return f"{path}: {_NO_DIRECT_IO}"
    return f"{path}: {reason}; {help_for}" if help_for else f"{path}: {reason}"


def _lock(fd: OwnedFd, path: Path, read_only: bool) -> None:
    request = _FLOCK.pack(fcntl.F_RDLCK if read_only else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd.fileno(), fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise HostError(f"{path}: locking: {os.strerror(error.errno or 0)}", errno=error.errno or 0) from error
        kind = "written" if read_only else "used"
        raise HostError(f"{path}: the image is being {kind} by another device or daemon", errno=errno.EBUSY) from error


def _examine(fd: OwnedFd, path: Path, read_only: bool, direct: bool, block_size: int) -> Image:
    number = fd.fileno()
    minimum, optimal, erase = 0, 0, 1
    is_block_device = stat.S_ISBLK(os.fstat(number).st_mode)
    if is_block_device:
        minimum, optimal = _ioctl(number, _BLKIOMIN, "I"), _ioctl(number, _BLKIOOPT, "I")
        erase = _ioctl(number, _BLKSSZGET, "i")
    image = Image(fd, is_block_device, None, erase, minimum, optimal)
    return replace(image, direct=_direct_io(image, path, read_only, block_size)) if direct else image


def _direct_io(image: Image, path: Path, read_only: bool, block_size: int) -> DirectIo:
    try:
        memory, offset = direct_alignment(image.fd)
    except HostError as error:
        raise HostError(f"{path}: {_NO_DIRECT_IO}", errno=error.errno) from error
    cached = open_again(image, path, direct=False) if offset > block_size and not read_only else None
    return DirectIo(memory, offset, cached)


def _ioctl(fd: int, request: int, form: str) -> int:
    value: int = struct.unpack(form, fcntl.ioctl(fd, request, bytes(struct.calcsize(form))))[0]
    return value
