"""Builds and loads ``bench_frontend``: the driver's side of virtio-blk in C (cffi, API mode, like the data plane).

The module is built into ``.cache/bench/`` when it is missing or older than its sources, so nothing of the
installed package depends on it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cffi import FFI

if TYPE_CHECKING:
    from types import ModuleType

HERE: Final = Path(__file__).resolve().parent
BUILD: Final = HERE.parent.parent / ".cache" / "bench"
MODULE: Final = "bench_frontend"
COMPILE_ARGS: Final = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden")


def find_sources() -> list[Path]:
    """Everything the compiled module is made from."""
    return [*sorted(HERE.glob("*.c")), *sorted(HERE.glob("*.h")), Path(__file__).resolve()]


def build(*, verbose: bool = False) -> Path:
    """Return the path of an up-to-date compiled module, after building it if need be.

    The module appears under its name only when it is complete, so that two processes may build at once.
    """
    target = BUILD / f"{MODULE}.abi3.so"
    if target.exists() and target.stat().st_mtime >= max(path.stat().st_mtime for path in find_sources()):
        return target
    builder = FFI()
    builder.cdef((HERE / "frontend.cdef.h").read_text(encoding="ascii"))
    builder.set_source(
        MODULE,
        '#include "frontend.h"',
        sources=[str(path) for path in sorted(HERE.glob("*.c"))],
        include_dirs=[str(HERE)],
        extra_compile_args=list(COMPILE_ARGS),
    )
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        Path(builder.compile(tmpdir=scratch, verbose=verbose)).replace(target)
    os.utime(target)
    return target


@cache
def load() -> ModuleType:
    """The compiled module (``.ffi`` and ``.lib``), built first if need be."""
    spec = importlib.util.spec_from_file_location(MODULE, build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module


def load_frontend() -> tuple[Any, Any]:
    """``(ffi, lib)`` of the compiled module."""
    module = load()
    return module.ffi, module.lib


if __name__ == "__main__":
    sys.stdout.write(f"{build(verbose=True)}\n")
