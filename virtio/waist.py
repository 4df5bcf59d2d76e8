"""The plain values that cross the waist between a transport and ``virtio.backend.backend.Backend``."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from virtio.errors import GuestError
from virtio.fd import OwnedFd


class AddressSpace(enum.IntEnum):
    """In which space a ring's addresses are given, and with it those in its descriptors."""

    GPA = 0  # guest physical, as are those in descriptors (virtio-mmio)
    UVA = 1  # the front-end's user virtual addresses; guest physical in descriptors (vhost-user without an IOMMU)
    IOVA = 2  # I/O virtual, in descriptors too, through the IOTLB (vhost-user with VIRTIO_F_ACCESS_PLATFORM)


class Doorbell(enum.IntEnum):
    """How the driver says "there is work"; each kind has an eventfd of its own, and all of them mean the same."""

    KICK = 0  # the plain one: vhost-user's kick fd, virtio-mmio's QueueNotify (4.2.2)
    PIO = 1  # a write to the device's notify port
    HYPERCALL = 2  # see transports.hypercall

    @property
    def label(self) -> str:
        """Its name in metrics and tables."""
        return self.name.lower()


class Permission(enum.IntFlag):
    """IOTLB access permissions, as in the vhost-user text (struct vhost_iotlb_msg)."""

    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One range of guest memory: ``size`` bytes at ``gpa``, in the file ``fd`` at ``offset``.

    The object keeps its fd for as long as a memory table that uses it lives; the mapping is made
    (and the file's size checked) when the region is first given to ``set_memory``.
    Regions are compared by identity, so that a table can be changed without mapping all of it anew.
    """

    gpa: int
    size: int
    uva: int
    offset: int
    fd: OwnedFd

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


PACKED_BASE_INITIAL: Final = 0x8000_8000
"""``QueueSetup.base`` of a packed ring that was never used: both indices 0, both wrap counters 1 (section 2.8.1)."""


@dataclass(frozen=True, slots=True)
class QueueSetup:
    """Where a virtqueue lies. ``base`` is the next index in vhost-user's encoding:
    split: the avail index; packed: bits 0-14 avail index, 15 its wrap counter, 16-30 used, 31 its wrap."""

    size: int
    desc: int
    avail: int
    used: int
    base: int
    space: AddressSpace


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    """The device's config space changed; the driver is to be told."""


@dataclass(frozen=True, slots=True)
class QueueBroken:
    """One queue stopped for good (until reset) through the driver's fault."""

    index: int
    error: GuestError


@dataclass(frozen=True, slots=True)
class IotlbMiss:
    """A queue waits for the translation of ``iova``."""

    iova: int
    perm: Permission


Event = ConfigChanged | QueueBroken | IotlbMiss
