"""Builds the compiled module ``virtio._dataplane`` (cffi, API mode) from the C of this folder's rooms.

liburing is linked statically: Debian 12's shared 2.3 does not export ``io_uring_register_restrictions``
and ``io_uring_enable_rings``.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

SOURCES = sorted(str(path.relative_to(ROOT)) for path in HERE.rglob("*.c"))
SUBJECTS = ("errors", "memory", "interrupt", "ring", "chain", "blk", "net", "worker")  # as dataplane.h includes them

ffibuilder = FFI()
for subject in SUBJECTS:
    ffibuilder.cdef((HERE / "border" / f"{subject}.cdef.h").read_text(encoding="ascii"))
ffibuilder.set_source(
    "virtio._dataplane",
    '#include "dataplane.h"',
    sources=SOURCES,
    depends=[str(path.relative_to(ROOT)) for path in HERE.rglob("*.h")],
    include_dirs=[str(HERE.relative_to(ROOT))],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden"],
    extra_link_args=["-l:liburing.a", "-lpthread"],
)
