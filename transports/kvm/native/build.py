"""Builds the compiled module ``transports._vmm`` (cffi, API mode) from the C files of this folder."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent

SOURCES = sorted(str(path.relative_to(ROOT)) for path in HERE.glob("*.c"))

ffibuilder = FFI()
ffibuilder.cdef((HERE / "vmm.cdef.h").read_text(encoding="ascii"))
ffibuilder.set_source(
    "transports._vmm",
    '#include "vmm.h"',
    sources=SOURCES,
    depends=[str(path.relative_to(ROOT)) for path in HERE.glob("*.h")],
    include_dirs=[str(HERE.relative_to(ROOT))],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden"],
    extra_link_args=["-lpthread"],
)
