"""Kernels for the tests of the PVH loader: small ELF files and bzImages, made field by field with struct alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

PT_LOAD = 1
PT_NOTE = 4
CODE = b"\xf4" * 64


@dataclass(frozen=True)
class Part:
    """One program header and its bytes; ``memsz`` counts from them when it is None."""

    kind: int
    paddr: int
    data: bytes
    memsz: int | None = None
    align: int = 4
    filesz: int | None = None


def pvh_note(entry: int, size: int = 8, *, name: bytes = b"Xen\0", kind: int = 18) -> bytes:
    text = entry.to_bytes(size, "little")
    return struct.pack("<III", len(name), len(text), kind) + name + bytes(-len(name) % 4) + text


def elf(parts: Sequence[Part], *, bits: int = 64, machine: int | None = None, encoding: int = 1) -> bytes:
    machine = machine if machine is not None else (62 if bits == 64 else 3)
    head_size, part_size = (64, 56) if bits == 64 else (52, 32)
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, encoding, 1]) + bytes(9)
    address = "Q" if bits == 64 else "I"
    # e_entry is not the PVH entry, and nobody may use it for that.
    head = ident + struct.pack(
        f"<HHI{address}{address}{address}IHHHHHH",
        *(2, machine, 1, 0xDEAD, head_size, 0, 0, head_size, part_size, len(parts), 0, 0, 0),
    )
    offset = head_size + part_size * len(parts)
    headers, body = b"", b""
    for part in parts:
        filesz = len(part.data) if part.filesz is None else part.filesz
        memsz = filesz if part.memsz is None else part.memsz
        at = offset + len(body)
        if bits == 64:
            headers += struct.pack("<IIQQQQQQ", part.kind, 7, at, 0, part.paddr, filesz, memsz, part.align)
        else:
            headers += struct.pack("<IIIIIIII", part.kind, at, 0, part.paddr, filesz, memsz, 7, part.align)
        body += part.data
    return head + headers + body


def plain_kernel(bits: int = 64, *, load_gpa: int = 0x100000) -> bytes:
    """One segment of code with some zeroed memory behind it, which begins in its middle."""
    note = pvh_note(load_gpa + 0x10, 8 if bits == 64 else 4)
    return elf([Part(PT_LOAD, load_gpa, CODE, memsz=0x3000), Part(PT_NOTE, 0, note)], bits=bits)


def bzimage(packed: bytes, size: int, *, version: int = 0x20F, setup_sectors: int = 3) -> bytes:
    """A bzImage whose payload is ``packed`` and then the unpacked ``size``."""
    payload = packed + struct.pack("<I", size)
    setup = bytearray((setup_sectors + 1) * 512)
    setup[0x1F1] = setup_sectors
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, 0x100, len(payload))
    return bytes(setup) + bytes(0x100) + payload + bytes(16)
