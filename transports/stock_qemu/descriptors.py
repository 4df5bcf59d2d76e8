"""What the library hands over: eventfds, of which only the number counts, and KVM's statistics of a vCPU.

A peer may send anything, so a descriptor is looked at by its name in /proc before it is used: reading a file of an
unknown kind could block the daemon.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from construct import Int16sl, Int16ul, Int32ul, Struct

from virtio.errors import PeerError
from virtio.fd import OwnedFd, eventfd_id

_EVENTFD: Final = "anon_inode:[eventfd]"
_STATISTICS: Final = "anon_inode:kvm-vcpu-stats"

# struct kvm_stats_header and kvm_stats_desc (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD)
_HEADER: Final = Struct(
    "flags" / Int32ul,
    "name_size" / Int32ul,
    "num_desc" / Int32ul,
    "id_offset" / Int32ul,
    "desc_offset" / Int32ul,
    "data_offset" / Int32ul,
)
_DESCRIPTOR: Final = Struct(
    "flags" / Int32ul, "exponent" / Int16sl, "size" / Int16ul, "offset" / Int32ul, "bucket_size" / Int32ul
)
_HEADER_SIZE: Final = 24
_DESCRIPTOR_SIZE: Final = 16
_NAME_MAX: Final = 256  # KVM has 48
_DESCRIPTORS_MAX: Final = 4096  # KVM has about 60
_HYPERCALLS: Final = b"hypercalls"


def doorbell_id(fd: OwnedFd) -> int | None:
    """The kernel's number of the eventfd behind ``fd``; ``PeerError`` if it is no eventfd.

    ``None`` on a kernel that does not tell (before 5.2): then no doorbell is known to be a queue's.
    """
    if _name(fd) != _EVENTFD:
        raise PeerError(f"a doorbell that is no eventfd: {_name(fd)}")
    return eventfd_id(fd.fileno())


def _name(fd: OwnedFd) -> str:
    return str(Path(f"/proc/self/fd/{fd.fileno()}").readlink())


class VcpuStatistics:
    """KVM's own count of a vCPU's hypercalls. Takes ``fd``; ``PeerError`` if it is something else."""

    def __init__(self, fd: OwnedFd) -> None:
        try:
            if not _name(fd).startswith(_STATISTICS):
                raise PeerError(f"statistics of a vCPU that are none: {_name(fd)}")
            self._offset = _find_hypercalls(fd.fileno())
        except BaseException:
            fd.close()
            raise
        self._fd = fd

    def hypercalls(self) -> int:
        """Hypercalls since the vCPU was made, of whatever kind; 0 when KVM does not count them."""
        if self._offset is None:
            return 0
        return int.from_bytes(os.pread(self._fd.fileno(), 8, self._offset), "little")

    def close(self) -> None:
        self._fd.close()


def _find_hypercalls(fd: int) -> int | None:
    """Where in the file the counter stands."""
    header = _HEADER.parse(os.pread(fd, _HEADER_SIZE, 0))
    if header.name_size > _NAME_MAX or header.num_desc > _DESCRIPTORS_MAX:
        raise PeerError(f"statistics with {header.num_desc} names of {header.name_size} bytes")
    step = _DESCRIPTOR_SIZE + header.name_size
    table = os.pread(fd, step * header.num_desc, header.desc_offset)
    for start in range(0, len(table) - step + 1, step):
        name = table[start + _DESCRIPTOR_SIZE : start + step].partition(b"\0")[0]
        if name == _HYPERCALLS:
            return int(header.data_offset + _DESCRIPTOR.parse(table[start : start + _DESCRIPTOR_SIZE]).offset)
    return None
