"""An image that is opened once more while it is served, so that flushes may succeed again after one has failed.

The kernel reports a write-back that failed once to each open file description. A new description has no memory of the
error, so a new one is taken only when the operator says so, and only of the file that is being served.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from virtio.devices.blk.image import Image, open_again
from virtio.errors import HostError
from virtio.fd import OwnedFd

Install = Callable[[OwnedFd, OwnedFd | None, Sequence[OwnedFd]], None]
"""Takes duplicates of the descriptions: the first one, one through the page cache, and those that others sync by."""


class Reopening:
    """Made on the event loop, called in a thread: it opens, syncs and closes files, each of which may hang.

    It has a descriptor of its own for the image, which may be closed meanwhile.
    """

    def __init__(self, image: Image, path: Path, sync_fds: int, install: Install) -> None:
        self._image = replace(image, fd=OwnedFd(os.dup(image.fd.fileno())))
        self._path = path
        self._sync_fds = sync_fds
        self._install = install

    def __call__(self) -> None:
        """``HostError``: the storage still fails, or the path is another file by now; nothing has changed then."""
        with ExitStack() as stack:
            image = self._image
            stack.callback(image.fd.close)
            self._check_that_the_path_is_this_file()
            first = stack.enter_context(open_again(image, self._path))
            cached = None
            if image.direct is not None and image.direct.cached_fd is not None:
                cached = stack.enter_context(open_again(image, self._path, direct=False))
            others = [stack.enter_context(open_again(image, self._path)) for _ in range(self._sync_fds)]
            try:
                os.fdatasync(first.fileno())
            except OSError as error:
                what = f"{self._path}: not opened again, its storage still fails: {error.strerror}"
                raise HostError(what, errno=error.errno or 0) from error
            self._install(first, cached, others)

    def _check_that_the_path_is_this_file(self) -> None:
        """A file that was put in its place is another disk, and no guest may find it under its feet."""
        try:
            there, ours = self._path.stat(), os.fstat(self._image.fd.fileno())
        except OSError as error:
            raise HostError(f"{self._path}: not opened again: {error.strerror}", errno=error.errno or 0) from error
        if self._image.is_block_device:
            same = there.st_rdev == ours.st_rdev
        else:
            same = (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
        if not same:
            raise HostError(
                f"{self._path} is another file than the one that is being served: not opened again; to serve that "
                "file, stop the guest and restart the daemon"
            )
