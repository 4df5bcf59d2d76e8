"""What size a disk has whose image has this size: nothing of an image is cut away unless the configuration says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from virtio.devices.blk.image import Image
from virtio.errors import HostError


class SizeOptions(Protocol):
    """The options of a disk that decide."""

    @property
    def path(self) -> Path | None: ...
    @property
    def block_size(self) -> int: ...
    @property
    def tail(self) -> str: ...
    @property
    def read_only(self) -> bool: ...


def usable_size(options: SizeOptions, size: int, is_block_device: bool) -> int:
    """The disk's size in bytes; more than the image's if that is to be extended. ``HostError``: it cannot be served."""
    path, block = options.path, options.block_size
    if size == 0:
        raise HostError(f"{path}: the image is empty; give it a size: truncate -s 10G FILE")
    rest = size % block
    if rest == 0:
        return size
    if options.tail == "extend" and not is_block_device:
        return size - rest + block
    if options.tail == "cut" and size > rest:
        return size - rest
    what = f"{path}: its {size} bytes are no multiple of block_size = {block}"
    if size == rest and options.tail == "cut":
        raise HostError(f"{what}: nothing would be left of it")
    remedies = [f'set tail = "cut", and the guest never sees the last {rest} bytes']
    if not is_block_device and options.read_only:
        remedies.insert(0, f"make it longer: truncate -s %{block} {path}")
    elif not is_block_device:
        remedies.insert(0, f'make it longer: truncate -s %{block} {path}, or set tail = "extend"')
    if block > 512 and size % 512 == 0:
        remedies.append("or set block_size = 512")
    raise HostError(f"{what}; {', '.join(remedies)}")


def extend_image(image: Image, options: SizeOptions, size: int) -> None:
    """Make the file so long."""
    try:
        os.ftruncate(image.fd.fileno(), size)
    except OSError as error:
        raise HostError(
            f"{options.path}: extending it to {size} bytes: {error.strerror}", errno=error.errno or 0
        ) from error
