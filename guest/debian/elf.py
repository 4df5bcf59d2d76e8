"""Another interpreter for a program, by which the kernel starts it."""

from __future__ import annotations

import struct
from pathlib import Path

from guest.debian.cache import PrepareError

PT_INTERP = 3
HEADERS = "<32xQ14xHH"  # of the ELF header: where the program headers are; the size of one, how many
IDENT_64_LITTLE = b"\x7fELF\x02\x01"


def with_interpreter(program: bytes, interpreter: Path) -> bytes:
    """``program`` (x86-64) with that interpreter. ``PrepareError``: it has none.

    The name is added at the end of the file and found there by the kernel. The C library's loader reads its name in
    memory, where the old one stays: that is the name by which libraries depend on it.
    """
    if not program.startswith(IDENT_64_LITTLE):
        raise PrepareError("is not a program for x86-64")
    changed = bytearray(program)
    first, size, count = struct.unpack_from(HEADERS, program)
    for offset in range(first, first + size * count, size):
        if struct.unpack_from("<I", program, offset) == (PT_INTERP,):
            name = bytes(interpreter.resolve()) + b"\0"
            struct.pack_into("<Q", changed, offset + 8, len(program))
            struct.pack_into("<Q", changed, offset + 32, len(name))
            return bytes(changed + name)
    raise PrepareError("is linked statically: it has no interpreter")
