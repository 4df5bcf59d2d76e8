"""The rules of the memory table: SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG.

Each ``with_...`` method answers the whole new table and changes nothing; the session installs it once
the back-end has mapped it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from transports.vhost_user.wire.payloads import RegionDescription
from virtio.errors import PeerError
from virtio.fd import OwnedFd
from virtio.waist import MemoryRegion

_U64_MAX = 2**64 - 1
_OFF_T_MAX = 2**63 - 1


class MemoryTable:
    """The regions the front-end shares, disjoint in guest addresses and in user addresses."""

    def __init__(self) -> None:
        self.regions: tuple[MemoryRegion, ...] = ()

    def with_all(self, descriptions: Sequence[RegionDescription], fds: Sequence[OwnedFd]) -> tuple[MemoryRegion, ...]:
        """A new table in the old one's place; descriptor i belongs to region i ("VHOST_USER_SET_MEM_TABLE")."""
        if len(fds) != len(descriptions):
            raise PeerError(f"{len(fds)} file descriptors for {len(descriptions)} regions; each region needs one")
        regions = tuple(_region(description, fd) for description, fd in zip(descriptions, fds, strict=True))
        for number, region in enumerate(regions):
            _check_disjoint(region, regions[:number])
        return regions

    def with_added(self, description: RegionDescription, fd: OwnedFd) -> tuple[MemoryRegion, ...]:
        """One region more, or one in the place of a region that has the very same addresses and another file."""
        region = _region(description, fd)
        others = tuple(one for one in self.regions if not _is(one, description))
        _check_disjoint(region, others)
        return (*others, region)

    def with_removed(self, description: RegionDescription) -> tuple[MemoryRegion, ...] | None:
        """One region less, or None if there is no such region.

        It is found by guest address, user address and size; the offset is ignored ("VHOST_USER_REM_MEM_REG").
        """
        key = (description.gpa, description.uva, description.size)
        kept = tuple(region for region in self.regions if (region.gpa, region.uva, region.size) != key)
        return kept if len(kept) < len(self.regions) else None

    def has(self, description: RegionDescription, fd: OwnedFd) -> bool:
        """Whether exactly this region of this file is in the table. A file that may not be asked is another one."""
        if fd.may_block:
            return False
        return any(_is(one, description) and os.path.sameopenfile(one.fd.fileno(), fd.fileno()) for one in self.regions)

    def holds(self, uva: int, size: int) -> bool:
        """Whether ``size`` bytes at the user address lie in one region ("IOMMU support")."""
        return any(region.uva <= uva and uva + size <= region.uva + region.size for region in self.regions)


def _is(region: MemoryRegion, description: RegionDescription) -> bool:
    return (region.gpa, region.uva, region.size, region.offset) == (
        description.gpa,
        description.uva,
        description.size,
        description.offset,
    )


def _region(description: RegionDescription, fd: OwnedFd) -> MemoryRegion:
    region = MemoryRegion(description.gpa, description.size, description.uva, description.offset, fd)
    if region.size == 0:
        raise PeerError(f"memory region at guest address {region.gpa:#x} has no size")
    for name, start, last in (
        ("guest address", region.gpa, _U64_MAX),
        ("user address", region.uva, _U64_MAX),
        ("mmap offset", region.offset, _OFF_T_MAX),
    ):
        if start + region.size > last:
            raise PeerError(f"memory region: {name} {start:#x} plus size {region.size:#x} overflows")
    return region


def _check_disjoint(region: MemoryRegion, others: Sequence[MemoryRegion]) -> None:
    for other in others:
        if region.gpa < other.gpa + other.size and other.gpa < region.gpa + region.size:
            raise PeerError(f"memory regions overlap in guest addresses: {_span(region.gpa, other.gpa)}")
        if region.uva < other.uva + other.size and other.uva < region.uva + region.size:
            raise PeerError(f"memory regions overlap in user addresses: {_span(region.uva, other.uva)}")


def _span(new: int, old: int) -> str:
    return f"the one at {new:#x} and the one at {old:#x}"
