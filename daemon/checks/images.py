"""What ``check`` sees of the images: what can be no disk is refused, what is only strange is noted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from config.loader import Config, Device
from config.origins import KeyPath
from config.problems import Problem
from virtio.devices.blk.device import BlkOptions
from virtio.devices.blk.image import WRITE_PROTECTED, is_write_protected, size_of
from virtio.devices.blk.image_formats import HEAD, format_notes
from virtio.devices.blk.image_size import usable_size
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.native.disk import direct_alignment
from virtio.remedies import remedy

_NO_IMAGES: Final = (
    (stat.S_ISDIR, "is a directory"),
    (stat.S_ISFIFO, "is a FIFO"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a character device"),
)


def image_faults(config: Config, *, as_daemon: bool) -> Iterator[Problem]:
    """Images that ``serve`` would refuse. ``as_daemon``: this process is the daemon's user, so what it may not open
    the daemon may not open."""
    for device, options, path in _images(config):
        key = ("devices", device.name, "path")
        try:
            about = path.stat()
        except OSError:
            continue  # a note: it may come later
        wrong = next((what for is_such, what in _NO_IMAGES if is_such(about.st_mode)), None)
        if wrong is not None:
            yield config.problem(key, f"{path} {wrong}", "an image is a regular file or a block device")
            continue
        if as_daemon and (closed := _closed(path, options)) is not None:
            yield config.problem(key, *closed)
            continue
        yield from _content_faults(config, device, options, path)


def _content_faults(config: Config, device: Device, options: BlkOptions, path: Path) -> Iterator[Problem]:
    try:
        fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return  # a note
    with fd:
        is_block_device = stat.S_ISBLK(os.fstat(fd.fileno()).st_mode)
        if not options.read_only and is_write_protected(fd):
            yield config.problem(("devices", device.name, "path"), *_split(WRITE_PROTECTED, path))
        try:
            usable_size(options, size_of(fd), is_block_device)
        except HostError as error:
            yield config.problem(("devices", device.name, "path"), *_split(str(error), path))
    if options.direct and not _takes_direct_io(path):
        message = "the file system of the image has no direct I/O"
        yield config.problem(("devices", device.name, "direct"), message, "leave it out, or move the image")


def image_notes(config: Config) -> Iterator[Problem]:
    """Images that this user finds closed, and those that look like something else than a raw disk."""
    for device, options, path in _images(config):
        key: KeyPath = ("devices", device.name, "path")
        try:
            about = path.stat()
        except OSError:
            continue  # daemon.checks.preflight says so
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISBLK(about.st_mode)):
            continue
        closed = _closed(path, options)
        if closed is not None:
            message, hint = closed
            yield config.problem(key, message, f"{hint} (check --user asks as another)")
        try:
            with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
                head, size = os.pread(fd.fileno(), HEAD, 0), size_of(fd)
        except OSError:
            continue
        note = format_notes(head, size, options.block_size, read_only=options.read_only)
        if note is not None:
            yield config.problem(key, f"{path} {note[0]}", note[1])


def _images(config: Config) -> Iterator[tuple[Device, BlkOptions, Path]]:
    for device in config.devices.values():
        if isinstance(device.options, BlkOptions) and device.options.path is not None:
            yield device, device.options, device.options.path


def _closed(path: Path, options: BlkOptions) -> tuple[str, str] | None:
    """What keeps this user from opening the image, and the remedy."""
    writing = not options.read_only
    if os.access(path, os.R_OK | (os.W_OK if writing else 0)):
        return None
    number = errno.EROFS if _on_read_only(path) and writing else errno.EACCES
    return f"{path}: {os.strerror(number)}, by this user", remedy(path, number, writing=writing, read_only_key=True)


def _split(text: str, path: Path) -> tuple[str, str]:
    """Message and hint of an error's line."""
    message, _, hint = text.removeprefix(f"{path}: ").partition("; ")
    return f"{path}: {message}", hint


def _takes_direct_io(path: Path) -> bool:
    try:
        with OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
            direct_alignment(fd)
    except (OSError, HostError) as error:
        return error.errno != errno.EINVAL
    return True


def _on_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False
