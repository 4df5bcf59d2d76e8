"""Builds the compiled module ``virtio._usernet`` (cffi, API mode), which is linked with libslirp."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "usernet.cdef.h").read_text(encoding="ascii"))
ffibuilder.set_source(
    "virtio._usernet",
    '#include <stdint.h>\n#include "usernet.cdef.h"',
    sources=[str((HERE / name).relative_to(ROOT)) for name in ("usernet.c", "confine.c")],
    depends=[str((HERE / "usernet.cdef.h").relative_to(ROOT))],
    include_dirs=[str(HERE.relative_to(ROOT))],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden"],
    define_macros=[("_GNU_SOURCE", None)],
    libraries=["slirp"],
)
