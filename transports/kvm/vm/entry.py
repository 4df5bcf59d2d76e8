"""The state in which a guest's first vCPU begins."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from transports.kvm.native import ffi, lib
from transports.kvm.vm.ram import PAGE, GuestRam

IDENTITY_MAP_PAGES: Final = 6
_PRESENT_WRITABLE: Final = 0x3
_LARGE: Final = 0x80
_TWO_MIB: Final = 1 << 21


@dataclass(frozen=True, slots=True)
class PvhEntry:
    """PVH's entry: 32-bit protected mode, paging off, flat segments, EBX at the start info."""

    rip: int
    start_info_gpa: int


@dataclass(frozen=True, slots=True)
class LongModeEntry:
    """64-bit mode at once, for small loops without a kernel. Interrupts are off and there is no GDT or IDT."""

    rip: int
    page_tables_gpa: int
    rdi: int = 0
    rsi: int = 0
    rdx: int = 0
    rcx: int = 0
    rsp: int = 0


Entry = PvhEntry | LongModeEntry


def write_identity_map(ram: GuestRam, gpa: int) -> None:
    """Page tables for ``LongModeEntry``: the low 4 GiB at their own addresses; ``IDENTITY_MAP_PAGES`` pages."""
    if gpa % PAGE:
        raise ValueError(f"page tables begin at a page, not at {gpa:#x}")
    directories = gpa + 2 * PAGE
    ram.write(gpa, struct.pack("<Q", gpa + PAGE | _PRESENT_WRITABLE))
    ram.write(gpa + PAGE, struct.pack("<4Q", *(directories + i * PAGE | _PRESENT_WRITABLE for i in range(4))))
    pages = (i * _TWO_MIB | _PRESENT_WRITABLE | _LARGE for i in range(4 * 512))
    ram.write(directories, struct.pack("<2048Q", *pages))


def entry_state(entry: Entry) -> Any:
    """The entry as C has it."""
    if isinstance(entry, PvhEntry):
        return ffi.new(
            "struct entry_state *", {"mode": lib.VM_ENTER_PVH, "rip": entry.rip, "rbx": entry.start_info_gpa}
        )
    return ffi.new(
        "struct entry_state *",
        {
            "mode": lib.VM_ENTER_LONG_MODE,
            "rip": entry.rip,
            "cr3": entry.page_tables_gpa,
            "rdi": entry.rdi,
            "rsi": entry.rsi,
            "rdx": entry.rdx,
            "rcx": entry.rcx,
            "rsp": entry.rsp,
        },
    )
