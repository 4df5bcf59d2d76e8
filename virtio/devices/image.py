"""Opening a disk image: one writer, never a guess about its format, and what the file says of its geometry."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from virtio.errors import HostError
from virtio.fd import OwnedFd

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKIOMIN = 0x1278
_BLKIOOPT = 0x1279

# struct flock of Linux on 64 bits: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class Image:
    """An opened image. Sizes in bytes; ``optimal_io`` 0: nothing known."""

    fd: OwnedFd
    is_block_device: bool
    block_size: int
    physical_block_size: int
    minimum_io: int
    optimal_io: int

    def size(self) -> int:
        """Its size now: files and block devices may be resized while they are served."""
        number = self.fd.fileno()
        return _ioctl(number, _BLKGETSIZE64, "Q") if self.is_block_device else os.fstat(number).st_size


def open_image(path: Path, *, read_only: bool, direct: bool) -> Image:
    """Open and lock the raw image at ``path``; ``HostError`` says what is in the way and what to do.

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
        _lock(fd, path, read_only)
        return _examine(fd, stat.S_ISBLK(mode), direct)
    except BaseException:
        fd.close()
        raise


def open_again(image: Image, path: Path | None) -> OwnedFd:
    """Another open file description of the file that ``image`` is, whatever lies at ``path`` by now; not locked."""
    number = image.fd.fileno()
    flags = fcntl.fcntl(number, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_DIRECT)
    try:
        return OwnedFd(os.open(f"/proc/self/fd/{number}", flags | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        raise HostError(f"{path}: opening it once more: {error.strerror}", errno=error.errno or 0) from error


def _open_trouble(path: Path, error: OSError, read_only: bool, direct: bool) -> str:
    reason = os.strerror(error.errno or 0)
    if error.errno == errno.ENOENT:
        return f"{path}: {reason}; make it first, for instance: truncate -s 10G {path}"
    if error.errno == errno.EINVAL and direct:
        return f"{path}: this file system has no direct I/O (tmpfs, for one); leave out direct = true"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not read_only:
        return f"{path}: {reason}; give the daemon's user write access, or set read_only = true"
    return f"{path}: {reason}"


def _lock(fd: OwnedFd, path: Path, read_only: bool) -> None:
    request = _FLOCK.pack(fcntl.F_RDLCK if read_only else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd.fileno(), fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise HostError(f"{path}: locking: {os.strerror(error.errno or 0)}", errno=error.errno or 0) from error
        kind = "written" if read_only else "used"
        raise HostError(f"{path}: the image is being {kind} by another device or daemon", errno=errno.EBUSY) from error


def _examine(fd: OwnedFd, is_block_device: bool, direct: bool) -> Image:
    number = fd.fileno()
    if is_block_device:
        return Image(
            fd=fd,
            is_block_device=True,
            block_size=_ioctl(number, _BLKSSZGET, "i"),
            physical_block_size=_ioctl(number, _BLKPBSZGET, "I"),
            minimum_io=_ioctl(number, _BLKIOMIN, "I"),
            optimal_io=_ioctl(number, _BLKIOOPT, "I"),
        )
    info = os.fstat(number)
    block_size = _disk_block_size(info.st_dev) if direct else 512
    physical = max(block_size, min(info.st_blksize, 1 << 16)) if info.st_blksize & (info.st_blksize - 1) == 0 else 512
    return Image(fd, False, block_size, physical, physical, 0)


def _disk_block_size(device: int) -> int:
    """The logical block size of the disk under a file system: what direct I/O has to be aligned to."""
    sysfs = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (sysfs / "queue", sysfs / ".." / "queue"):  # a disk, or a partition of it
        try:
            return int((queue / "logical_block_size").read_text())
        except (OSError, ValueError):
            continue
    return 4096  # no block device that we can see (network, overlay): the alignment that suits every disk


def _ioctl(fd: int, request: int, form: str) -> int:
    value: int = struct.unpack(form, fcntl.ioctl(fd, request, bytes(struct.calcsize(form))))[0]
    return value
