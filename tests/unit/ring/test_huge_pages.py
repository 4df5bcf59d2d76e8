"""Guest memory in huge pages: a region that is no multiple of one is mapped, used and unmapped like any other."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from virtio.fd import OwnedFd
from virtio.native.memory import MemoryTable
from virtio.waist import MemoryRegion

MIB: Final = 1 << 20
HUGE: Final = 2 * MIB


@pytest.fixture
def memory() -> Iterator[int]:
    """8 MiB in huge pages of 2 MiB; none of them need be free, for nothing here touches them."""
    try:
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    except OSError as error:
        pytest.skip(f"this machine's kernel has no huge pages of 2 MiB: {error.strerror}")
    os.ftruncate(fd, 4 * HUGE)
    yield fd
    os.close(fd)


def mappings() -> list[str]:
    """Mappings of the file in this process, by their ranges of addresses."""
    lines = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines()
    return [line.split()[0] for line in lines if "/memfd:huge" in line]


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, HUGE), (0, 3 * MIB), (0, HUGE + 4096), (0, 1), (HUGE, 3 * MIB), (MIB, MIB), (3 * MIB, 3 * MIB),
        (HUGE - 4096, 8192), (5, 7), (7 * MIB, MIB),
    ],
)  # fmt: skip
def test_a_region_of_any_size_and_offset_leaves_no_mapping_behind(memory: int, offset: int, size: int) -> None:
    assert mappings() == []
    region = MemoryRegion(0x4000_0000, size, 0x7F00_0000_0000, offset, OwnedFd(os.dup(memory)))
    table = MemoryTable([region])
    (found,) = mappings()
    start, end = (int(part, 16) for part in found.split("-"))
    assert (start % HUGE, end % HUGE) == (0, 0)
    assert end - start <= size + 2 * HUGE - 2, "no more pages than the region touches"
    table.close_dropped(MemoryTable())
    del table
    assert mappings() == []


def test_ordinary_memory_is_mapped_in_ordinary_pages() -> None:
    fd = os.memfd_create("ordinary", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    region = MemoryRegion(0x4000_0000, 5000, 0x7F00_0000_0000, 4096 + 8, OwnedFd(fd))
    table = MemoryTable([region])
    lines = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines()
    (line,) = (line for line in lines if "/memfd:ordinary" in line)
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    assert end - start == 2 * mmap.PAGESIZE
    table.close_dropped(MemoryTable())
