"""The library that gives stock QEMU the hypercall doorbell. Python only knows where it is; see ``preload.h`` for it."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from virtio.errors import HostError

VARIABLE_SOCKET = "HYPERBELL_SOCKET"
VARIABLE_KEY = "HYPERBELL_KEY"
VARIABLE_NAME = "HYPERBELL_VM"


def library_path() -> Path:
    """Where the library is. ``HostError`` when it was not built, or cannot be named in LD_PRELOAD."""
    folder = Path(__file__).resolve().parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_library{suffix}"
        if path.exists():
            break
    else:
        raise HostError(f"{folder} has no _library{EXTENSION_SUFFIXES[0]}; install hyperbell again (make build)")
    if any(character in str(path) for character in " :"):
        raise HostError(f"{path}: LD_PRELOAD takes no path with a space or a colon; install hyperbell elsewhere")
    return path
