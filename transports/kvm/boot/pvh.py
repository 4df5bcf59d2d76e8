"""Loads a kernel for the PVH entry (Xen's "x86/HVM direct boot ABI"): an ELF file whose note tells where to begin.

The guest begins in 32-bit protected mode, paging off, with EBX at a ``struct hvm_start_info`` that leads to the
command line, the initrd, the map of memory and ACPI's RSDP. Nothing here touches a machine: what comes out is what is
to be written where. Errors name the file and are ``HostError``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from construct import Array, Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

from transports.kvm.boot.acpi import RESET_PORT, RESET_VALUE
from transports.kvm.boot.bzimage import is_bzimage, unpack_bzimage
from virtio.errors import HostError

# Where things lie below 1 MiB. The kernel proper is above; what Linux needs of these pages it copies early.
START_INFO_GPA: Final = 0x6000
COMMAND_LINE_GPA: Final = 0x20000
LEGACY_HOLE_GPA: Final = 0xA0000
"""Video memory and ROMs in a PC: nobody takes it for RAM, so it is where the ACPI tables can stay for good."""
ACPI_GPA: Final = 0xE0000
"""Here a PC's BIOS has its RSDP too (ACPI 6.5, 5.2.5.1)."""
RESET_VECTOR_GPA: Final = 0xFFFF0
"""Where a processor of the 8086 kind begins. Linux jumps there, in real mode, when it shall restart a machine that is
hardware-reduced (it takes it for one with EFI, and this is what is left when there is none)."""
HIGH_MEMORY_GPA: Final = 0x100000

PAGE: Final = 4096
COMMAND_LINE_MAX: Final = 2047  # Linux x86's COMMAND_LINE_SIZE less the zero; it would cut off the rest without a word
IMAGE_MAX: Final = 1 << 30

START_MAGIC: Final = 0x336EC578  # "xEn3" with the top bit of the E set
START_VERSION: Final = 1  # the first with a map of memory
MEMORY_MAP_RAM: Final = 1
MEMORY_MAP_RESERVED: Final = 2

_START_INFO: Final = Struct(
    "magic" / Const(START_MAGIC, Int32ul),
    "version" / Const(START_VERSION, Int32ul),
    "flags" / Const(0, Int32ul),
    "module_count" / Int32ul,
    "modules_gpa" / Int64ul,
    "command_line_gpa" / Int64ul,
    "rsdp_gpa" / Int64ul,
    "memory_map_gpa" / Int64ul,
    "memory_map_count" / Int32ul,
    Padding(4),
)
_MODULE: Final = Struct("gpa" / Int64ul, "size" / Int64ul, "command_line_gpa" / Const(0, Int64ul), Padding(8))
_MEMORY_MAP_ENTRY: Final = Struct("gpa" / Int64ul, "size" / Int64ul, "kind" / Int32ul, Padding(4))
_MEMORY_MAP: Final = Array(3, _MEMORY_MAP_ENTRY)

# ELF, as in the System V ABI; the two classes differ in widths and, for a program header, in order.
ELF_MAGIC: Final = b"\x7fELF"
_ELF_IDENT: Final = Struct("magic" / Bytes(4), "elf_class" / Int8ul, "encoding" / Int8ul, Padding(10))
_HEADERS: Final = {
    1: Struct(
        *("type" / Int16ul, "machine" / Int16ul, Padding(4), "entry" / Int32ul, "phoff" / Int32ul, Padding(4)),
        *(Padding(4), Padding(2), "phentsize" / Int16ul, "phnum" / Int16ul, Padding(6)),
    ),
    2: Struct(
        *("type" / Int16ul, "machine" / Int16ul, Padding(4), "entry" / Int64ul, "phoff" / Int64ul, Padding(8)),
        *(Padding(4), Padding(2), "phentsize" / Int16ul, "phnum" / Int16ul, Padding(6)),
    ),
}
_PROGRAM_HEADERS: Final = {
    1: Struct(
        *("type" / Int32ul, "offset" / Int32ul, "vaddr" / Int32ul, "paddr" / Int32ul),
        *("filesz" / Int32ul, "memsz" / Int32ul, "flags" / Int32ul, "align" / Int32ul),
    ),
    2: Struct(
        *("type" / Int32ul, "flags" / Int32ul, "offset" / Int64ul, "vaddr" / Int64ul, "paddr" / Int64ul),
        *("filesz" / Int64ul, "memsz" / Int64ul, "align" / Int64ul),
    ),
}
_NOTE: Final = Struct("namesz" / Int32ul, "descsz" / Int32ul, "type" / Int32ul)
MACHINES: Final = {3, 62}  # EM_386, EM_X86_64
PT_LOAD: Final = 1
PT_NOTE: Final = 4
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
PVH_ADVICE: Final = "Linux has the PVH entry with CONFIG_PVH=y (distributions' kernels do)"


_RESET_CODE: Final = (
    b"\xba" + RESET_PORT.to_bytes(2, "little")  # mov dx, RESET_PORT
    + b"\xb0" + RESET_VALUE.to_bytes(1, "little")  # mov al, RESET_VALUE
    + b"\xee"  # out dx, al
    + b"\xf4\xeb\xfd"  # hlt, and again
)  # fmt: skip


class Placement(NamedTuple):
    """Bytes that must be in guest memory before the guest begins; the rest of memory is zero."""

    gpa: int
    data: bytes | memoryview


class Segment(NamedTuple):
    """One part of a kernel: ``size`` bytes from ``gpa``, the first of which are ``data`` and the rest zero."""

    gpa: int
    size: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Kernel:
    """A checked kernel: ``name`` is how errors call it, ``entry_gpa`` its PVH entry."""

    name: str
    entry_gpa: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Boot:
    """A guest ready to begin: everything in its place, EIP at ``entry_gpa``, EBX = ``start_info_gpa``."""

    entry_gpa: int
    start_info_gpa: int
    placements: tuple[Placement, ...]


def read_kernel(path: Path) -> Kernel:
    """The kernel in the file ``path``: an ELF with a PVH entry, or a bzImage of one."""
    return parse_kernel(read_image(path), str(path))


def read_image(path: Path, limit: int = IMAGE_MAX) -> bytes:
    """The content of a regular file of at most ``limit`` bytes."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise HostError(f"{path}: is not a regular file")
            if info.st_size > limit:
                raise HostError(f"{path}: has {info.st_size} bytes, more than the {limit} there is room for")
            return file.read(limit)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}", errno=error.errno or 0) from error


def parse_kernel(image: bytes, name: str) -> Kernel:
    """The kernel in ``image``; ``name`` is its file for errors."""
    try:
        if is_bzimage(image) and not image.startswith(ELF_MAGIC):
            image = unpack_bzimage(image)
        return _parse_elf(image, name)
    except HostError as error:
        raise HostError(f"{name}: {error}", errno=error.errno) from error


def lay_out(
    kernel: Kernel,
    memory_size: int,
    *,
    command_line: str = "",
    initrd: bytes = b"",
    initrd_name: str = "the initrd",
    acpi_tables: bytes = b"",
) -> Boot:
    """Everything in a guest's memory of ``memory_size`` bytes from address 0.

    ``acpi_tables`` begin with the RSDP and were built for ``ACPI_GPA``; with them the old reset vector leads to the
    reset register that they name. ``HostError`` when something has no room.
    """
    line = command_line.encode("utf-8", "surrogateescape")
    if b"\0" in line or len(line) > COMMAND_LINE_MAX:
        wrong = "holds a NUL character" if b"\0" in line else f"has {len(line)} bytes"
        raise HostError(f"the kernel's command line {wrong}; it may have up to {COMMAND_LINE_MAX} without one")
    if memory_size < 2 * HIGH_MEMORY_GPA or memory_size % PAGE:
        raise HostError(f"the guest's memory is {memory_size} bytes; 2 MiB, in whole pages, is the least")
    if len(acpi_tables) > RESET_VECTOR_GPA - ACPI_GPA:
        raise HostError(f"the ACPI tables have {len(acpi_tables)} bytes, more than there is room for")
    initrd_gpa = max(0, (memory_size - len(initrd)) // PAGE * PAGE)
    start_info = _start_info(memory_size, initrd_gpa, len(initrd), has_acpi=bool(acpi_tables))
    _check_room(
        memory_size,
        [
            *((segment.gpa, segment.size, kernel.name) for segment in kernel.segments),
            (START_INFO_GPA, len(start_info), "the start info"),
            (COMMAND_LINE_GPA, len(line) + 1, "the command line"),
            (LEGACY_HOLE_GPA, HIGH_MEMORY_GPA - LEGACY_HOLE_GPA, "the area without RAM below 1 MiB"),
            *([(initrd_gpa, len(initrd), initrd_name)] if initrd else []),
        ],
    )
    placements = [Placement(segment.gpa, segment.data) for segment in kernel.segments if segment.data]
    placements.append(Placement(START_INFO_GPA, start_info))
    placements.append(Placement(COMMAND_LINE_GPA, line + b"\0"))
    if acpi_tables:
        placements.append(Placement(ACPI_GPA, acpi_tables))
        placements.append(Placement(RESET_VECTOR_GPA, _RESET_CODE))
    if initrd:
        placements.append(Placement(initrd_gpa, initrd))
    return Boot(kernel.entry_gpa, START_INFO_GPA, tuple(placements))


def _start_info(memory_size: int, initrd_gpa: int, initrd_size: int, *, has_acpi: bool) -> bytes:
    """struct hvm_start_info, then its list of modules, then its map of memory."""
    modules = bytes(_MODULE.build({"gpa": initrd_gpa, "size": initrd_size})) if initrd_size else b""
    memory_map = (
        (0, LEGACY_HOLE_GPA, MEMORY_MAP_RAM),
        (LEGACY_HOLE_GPA, HIGH_MEMORY_GPA - LEGACY_HOLE_GPA, MEMORY_MAP_RESERVED),
        (HIGH_MEMORY_GPA, memory_size - HIGH_MEMORY_GPA, MEMORY_MAP_RAM),
    )
    modules_gpa = START_INFO_GPA + int(_START_INFO.sizeof())
    info = _START_INFO.build(
        {
            "module_count": 1 if modules else 0,
            "modules_gpa": modules_gpa if modules else 0,
            "command_line_gpa": COMMAND_LINE_GPA,
            "rsdp_gpa": ACPI_GPA if has_acpi else 0,
            "memory_map_gpa": modules_gpa + len(modules),
            "memory_map_count": len(memory_map),
        }
    )
    entries = _MEMORY_MAP.build([{"gpa": gpa, "size": size, "kind": kind} for gpa, size, kind in memory_map])
    return bytes(info) + modules + bytes(entries)


def _check_room(memory_size: int, spans: Iterable[tuple[int, int, str]]) -> None:
    """Each (gpa, size, name) lies in memory and no two overlap, or ``HostError``."""
    last_end, last_name = 0, ""
    for gpa, size, name in sorted(spans):
        if gpa + size > memory_size:
            raise HostError(
                f"{name}: does not fit into the guest's memory of {memory_size >> 20} MiB "
                f"(it needs {size} bytes at {gpa:#x}); give the guest more memory"
            )
        if gpa < last_end:
            other = f" and {last_name} overlap" if last_name != name else ": two of its segments overlap"
            advice = "; give the guest more memory" if gpa >= HIGH_MEMORY_GPA and last_name != name else ""
            raise HostError(f"{name}{other} at {gpa:#x} in the guest's memory{advice}")
        last_end, last_name = gpa + size, name


# ---- ELF ----


def _parse_elf(image: bytes, name: str) -> Kernel:
    if not image.startswith(ELF_MAGIC):
        raise HostError(f"is neither an ELF file (vmlinux) nor a bzImage; {PVH_ADVICE}")
    ident = _parse(_ELF_IDENT, image, 0)
    if ident.elf_class not in _HEADERS or ident.encoding != 1:
        raise HostError("is an ELF file, but not for x86")
    header = _parse(_HEADERS[ident.elf_class], image, int(_ELF_IDENT.sizeof()))
    program_header = _PROGRAM_HEADERS[ident.elf_class]
    if header.machine not in MACHINES:
        raise HostError(f"is an ELF file for another machine (number {header.machine}), not for x86")
    if header.phnum and header.phentsize != program_header.sizeof():
        raise HostError("is a damaged ELF file: its program headers have no known size")
    parts = [_parse(program_header, image, header.phoff + n * header.phentsize) for n in range(header.phnum)]
    segments = tuple(_segment(image, part) for part in parts if part.type == PT_LOAD and part.memsz)
    if not segments:
        raise HostError("is an ELF file with nothing to load, perhaps a module or an object file; give the vmlinux")
    notes = [(_content(image, part), 8 if part.align == 8 else 4) for part in parts if part.type == PT_NOTE]
    entry = _pvh_entry(notes)
    if entry is None:
        raise HostError(f"has no PVH entry (no Xen note of type {XEN_ELFNOTE_PHYS32_ENTRY}); {PVH_ADVICE}")
    if not any(segment.gpa <= entry < segment.gpa + len(segment.data) for segment in segments):
        raise HostError(f"is a damaged ELF file: its PVH entry {entry:#x} is in none of its segments")
    return Kernel(name, entry, segments)


def _parse(struct: Any, image: bytes, offset: int) -> Any:
    size = struct.sizeof()
    if offset + size > len(image):
        raise HostError(f"is an ELF file that ends early ({len(image)} bytes); copy it again")
    return struct.parse(image[offset : offset + size])


def _content(image: bytes, part: Any) -> memoryview:
    if part.offset + part.filesz > len(image):
        raise HostError(
            f"is an ELF file that ends early: it has {len(image)} bytes, and one segment reaches to "
            f"{part.offset + part.filesz}; copy it again"
        )
    return memoryview(image)[part.offset : part.offset + part.filesz]


def _segment(image: bytes, part: Any) -> Segment:
    if part.filesz > part.memsz:
        raise HostError("is a damaged ELF file: a segment is larger in the file than in memory")
    return Segment(part.paddr, part.memsz, _content(image, part))


def _pvh_entry(note_segments: Sequence[tuple[memoryview, int]]) -> int | None:
    """What the note XEN_ELFNOTE_PHYS32_ENTRY says: 4 bytes, or 8 from a 64-bit kernel."""
    for content, align in note_segments:
        offset, head = 0, int(_NOTE.sizeof())
        while offset + head <= len(content):
            note = _NOTE.parse(bytes(content[offset : offset + head]))
            name_at = offset + head
            text_at = _round_up(name_at + note.namesz, align)
            if text_at + note.descsz > len(content):
                raise HostError("is a damaged ELF file: a note is longer than its segment")
            name = bytes(content[name_at : name_at + note.namesz])
            if note.type == XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen\0" and note.descsz in (4, 8):
                return int.from_bytes(content[text_at : text_at + note.descsz], "little")
            offset = _round_up(text_at + note.descsz, align)
    return None


def _round_up(number: int, align: int) -> int:
    return -(-number // align) * align
