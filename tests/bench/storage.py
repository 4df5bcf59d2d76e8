"""Where the benchmark's files lie: a RAM-backed file system and a disk, told apart and filled with data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from tests.bench.blk_frontend import pattern_bytes

RAM_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs"})
CHUNK: Final = 1 << 20


class StorageError(Exception):
    """A folder is not what the benchmark needs; the text says what would be."""


def file_system_of(path: Path) -> str:
    """Type of the file system that holds ``path``, for instance "tmpfs" or "ext4"."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == number:
            return rest.split()[0]
    return "unknown"


def check_folder(folder: Path, *, ram: bool, size: int) -> None:
    """Raise ``StorageError`` unless ``folder`` is RAM-backed (or not, as asked) and has room for ``size`` bytes."""
    kind = file_system_of(folder)
    if (kind in RAM_FILE_SYSTEMS) != ram:
        option = "--ram-dir" if ram else "--disk-dir"
        raise StorageError(f"{folder} is on {kind}: name a folder {'on tmpfs' if ram else 'on a disk'} with {option}")
    free = shutil.disk_usage(folder).free
    if free < size * 1.1:
        raise StorageError(f"{folder} has {free >> 20} MiB free, {size >> 20} are needed: make room or use --size")


def make_file(path: Path, size: int) -> None:
    """Write ``size`` bytes of the pattern to ``path``, down to the disk; the pages stay in the page cache."""
    with path.open("wb") as file:
        for offset in range(0, size, CHUNK):
            file.write(pattern_bytes(offset, min(CHUNK, size - offset)))
        file.flush()
        os.fsync(file.fileno())


def drop_cache(path: Path) -> None:
    """Put ``path``'s clean pages out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(path: Path) -> None:
    """Read all of ``path`` once."""
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK):
            pass
