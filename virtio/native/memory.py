"""Guest memory as Python holds it: mapped regions, immutable tables of them, and the IOTLB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from virtio.dataplane import check, ffi, lib
from virtio.errors import HostError
from virtio.waist import MemoryRegion


def install_sigbus_guard() -> None:
    """Survive a memory file that shrinks under us (DESIGN: the border, rule 4). Harmless to call again."""
    check(lib.sigbus_install(), "installing the SIGBUS handler")


def file_system(fd: int) -> int:
    """The magic number of the file system that ``fd`` is on. It is asked, and may take its time. ``HostError``."""
    kind = ffi.new("uint32_t *")
    check(lib.file_system(fd, kind), "asking for the file system of guest memory")
    return int(kind[0])


class Mapping:
    """One region's mmap; unmapped when the last table and chain that use it are gone."""

    def __init__(self, region: MemoryRegion) -> None:
        error = ffi.new("int *")
        pointer = lib.mapping_new(region.fd.fileno(), region.offset, region.size, error)
        if pointer == ffi.NULL:
            check(error[0], f"mapping {region.size:#x} bytes of guest memory at {region.gpa:#x}")
        self.pointer: Any = ffi.gc(pointer, lib.mapping_unref)

    @property
    def dead(self) -> bool:
        """True once the file behind it was truncated: it reads as zeroes and nobody sees what is written."""
        return bool(lib.mapping_dead(self.pointer))


class MemoryTable:
    """An immutable set of regions, built from the one before it so that unchanged regions stay mapped.

    Raises ``HostError`` when a region cannot be mapped; the table before it is then untouched.
    """

    def __init__(self, regions: Sequence[MemoryRegion] = (), before: MemoryTable | None = None) -> None:
        known = before.mappings if before is not None else {}
        self.mappings: dict[MemoryRegion, Mapping] = {r: known.get(r) or Mapping(r) for r in regions}
        specs = ffi.new("struct memory_region[]", max(len(regions), 1))
        for spec, (region, mapping) in zip(specs, self.mappings.items(), strict=False):
            spec.gpa, spec.size, spec.uva = region.gpa, region.size, region.uva
            spec.mapping = mapping.pointer
        pointer = lib.memory_table_new(specs, len(self.mappings))
        if pointer == ffi.NULL:
            raise HostError("no memory for a memory table")
        self.pointer: Any = ffi.gc(pointer, lib.memory_table_unref)

    def close_dropped(self, after: MemoryTable) -> None:
        """Close the fds of the regions that ``after`` no longer has."""
        for region in self.mappings:
            if region not in after.mappings:
                region.fd.close()


class Iotlb:
    """I/O virtual to user virtual addresses of one connection (VIRTIO_F_ACCESS_PLATFORM)."""

    def __init__(self) -> None:
        pointer = lib.iotlb_new()
        if pointer == ffi.NULL:
            raise HostError("no memory for an IOTLB")
        self.pointer: Any = ffi.gc(pointer, lib.iotlb_unref)

    def update(self, iova: int, size: int, uva: int, perm: int) -> None:
        """Add or replace a translation; ``HostError`` when it is empty, wraps or allows nothing."""
        check(lib.iotlb_update(self.pointer, iova, size, uva, perm), f"IOTLB update at {iova:#x}")

    def invalidate(self, iova: int, size: int) -> None:
        lib.iotlb_invalidate(self.pointer, iova, size)

    def clear(self) -> None:
        lib.iotlb_clear(self.pointer)
