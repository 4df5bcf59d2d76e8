"""Where fetched and built files are kept between runs, and how they get there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str], None]


class PrepareError(Exception):
    """The machine lacks something a guest needs; the text says what it is and how to get it."""


def cache_folder() -> Path:
    """The cache: ``$HYPERBELL_CACHE``, or ``.cache`` in the checkout. Created when missing."""
    configured = os.environ.get("HYPERBELL_CACHE")
    folder = Path(configured) if configured else Path(__file__).resolve().parents[2] / ".cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(
            f"cannot create the cache folder {folder}: {error.strerror}; set HYPERBELL_CACHE to a writable folder"
        ) from error
    return folder


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as ``beside``, so that a rename out of it is atomic."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".making-", dir=beside, ignore_cleanup_errors=True)
    except OSError as error:
        raise PrepareError(
            f"cannot write to the cache folder {beside}: {error.strerror}; set HYPERBELL_CACHE to a writable folder"
        ) from error
    with scratch as name:
        yield Path(name)


def store_file(target: Path, content: bytes, mode: int = 0o644) -> Path:
    """Write ``content`` to ``target`` so that another process sees the whole file or none."""
    with scratch_folder(target.parent) as scratch:
        made = scratch / target.name
        made.write_bytes(content)
        made.chmod(mode)
        made.rename(target)
    return target
