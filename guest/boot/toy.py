"""Compile the small guest program of ``guest/toy``: a virtio driver without an operating system, for 32 and 64 bit.

What it does and its command line: the comment at the top of ``guest/toy/main.c``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from guest.boot.compiler import run_compiler
from guest.debian.cache import Progress, cache_folder, scratch_folder

SOURCES = Path(__file__).resolve().parents[1] / "toy"
LINKER_SCRIPT = "start/toy.lds"
# No library of any kind, so that a gcc without the 32-bit libc (gcc-multilib) is enough; no vector registers, which the
# program does not switch on; memory is seen as bytes and as words, as a driver sees it.
COMPILE = (
    *("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror"),
    *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie"),
    *("-mgeneral-regs-only", "-mno-red-zone", "-fno-strict-aliasing", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fcf-protection=none"),
    "-Wl,--build-id=none",
)


@dataclass(frozen=True)
class Toy:
    """The two programs: ELF files with a PVH entry, the first of class 32, the other of class 64."""

    bits32: Path
    bits64: Path

    def program(self, bits: int) -> Path:
        """The one for a processor of so many bits."""
        return {32: self.bits32, 64: self.bits64}[bits]


def prepare_toy(progress: Progress) -> Toy:
    """Both programs, from the cache while their sources are the same. Raises ``PrepareError`` with advice."""
    return Toy(_compiled(32, progress), _compiled(64, progress))


def _compiled(bits: int, progress: Progress) -> Path:
    command = (*COMPILE, f"-m{bits}")
    sources = sorted(path for path in SOURCES.rglob("*") if path.is_file())
    digest = hashlib.sha256("\0".join(command).encode())
    for source in sources:
        digest.update(str(source.relative_to(SOURCES)).encode() + b"\0" + source.read_bytes())
    cache = cache_folder()
    target = cache / f"toy{bits}-{digest.hexdigest()[:16]}.elf"
    if target.exists():
        return target
    progress(f"compiling the toy guest for {bits} bit")
    with scratch_folder(cache) as scratch:
        made = scratch / target.name
        units = [str(source) for source in sources if source.suffix in {".c", ".S"}]
        run_compiler(
            [*command, f"-I{SOURCES}", "-T", str(SOURCES / LINKER_SCRIPT), "-o", str(made), *units],
            f"guest/toy does not compile for {bits} bit",
            "package 'gcc'",
        )
        made.rename(target)
    return target
