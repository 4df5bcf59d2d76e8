"""The pattern that ``diskcheck`` writes, computed on the host: image files are checked without the guest."""

from __future__ import annotations

import os
import struct
from pathlib import Path

SECTOR_SIZE = 512
BLOCK_SIZE = 4096
MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15  # any odd constant; the same as in guest/programs/diskcheck.c
SECTOR_WORDS = struct.Struct("<64Q")
SECTOR_HEADER = struct.Struct("<QII")


def mix64(value: int) -> int:
    """Spread 64 bits over all 64 bits (guest/programs/diskcheck.c, ``mix64``)."""
    value ^= value >> 30
    value = value * 0xBF58476D1CE4E5B9 & MASK
    value ^= value >> 27
    value = value * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def sector_content(sector: int, seed: int, generation: int = 0) -> bytes:
    """The 512 bytes that belong at ``sector`` (counted from the disk's start)."""
    tag = seed << 32 | generation
    base = mix64(sector ^ mix64(tag))
    return SECTOR_WORDS.pack(sector, tag, *((base + index * STEP) & MASK for index in range(2, 64)))


def check_pattern(image: Path, offset: int, length: int, seed: int) -> str:
    """``""`` if ``image`` holds the pattern of ``seed`` there, else where it differs. All in bytes."""
    data = _read(image, offset, length)
    for done in range(0, length, SECTOR_SIZE):
        sector = (offset + done) // SECTOR_SIZE
        if data[done : done + SECTOR_SIZE] != sector_content(sector, seed):
            return f"sector {sector} (byte {sector * SECTOR_SIZE}) of {image.name} is not what the guest wrote"
    return ""


def check_zeroes(image: Path, offset: int, length: int) -> str:
    """``""`` if ``image`` reads as zeroes there, else where it does not."""
    data = _read(image, offset, length)
    if data.count(0) == length:
        return ""
    first = offset + len(data) - len(data.lstrip(b"\0"))
    return f"byte {first} of {image.name} is not zero"


def sum_generations(image: Path, offset: int, length: int, seed: int) -> int:
    """Check every block that ``diskcheck stress`` left, and add their generations: its last writes are all there.

    Raises ``ValueError`` for a block that is torn, belongs elsewhere or has another seed.
    """
    data = _read(image, offset, length)
    total = 0
    for done in range(0, length, BLOCK_SIZE):
        first = (offset + done) // SECTOR_SIZE
        generation = SECTOR_HEADER.unpack_from(data, done)[1]
        for index in range(BLOCK_SIZE // SECTOR_SIZE):
            begin = done + index * SECTOR_SIZE
            if data[begin : begin + SECTOR_SIZE] != sector_content(first + index, seed, generation):
                raise ValueError(f"sector {first + index} of {image.name} is not of generation {generation}")
        total += generation
    return total


def _read(image: Path, offset: int, length: int) -> bytes:
    with image.open("rb") as file:
        data = os.pread(file.fileno(), length, offset)
    if len(data) != length:
        raise ValueError(f"{image.name} is too short: {len(data)} of {length} bytes at {offset}")
    return data
