"""Small guests for tests: assembled by GNU as, placed at an address, entered in 32-bit or in 64-bit mode."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def assemble(source: str, *, origin: int = 0x1000, bits: int = 32) -> bytes:
    """The bytes of a program in AT&T syntax that runs at ``origin``."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-as-") as folder:
        linked, raw = Path(folder) / "linked", Path(folder) / "raw"
        objects = Path(folder) / "object"
        subprocess.run(["as", f"--{bits}", "-o", objects, "-"], input=f"{source}\n".encode(), check=True)
        machine = {32: "elf_i386", 64: "elf_x86_64"}[bits]
        subprocess.run(
            ["ld", "-m", machine, f"-Ttext={origin:#x}", "-e", f"{origin:#x}", "-o", linked, objects], check=True
        )
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", linked, raw], check=True)
        return raw.read_bytes()
