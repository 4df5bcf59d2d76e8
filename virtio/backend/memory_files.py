"""Which files may be guest memory: those whose pages the kernel itself brings.

A page of FUSE comes from a process, one of NFS from another host. While it does not come, whoever touches it sleeps and
cannot be woken: a worker, with all its disks, or the event loop. Even to ask such a file system for its name may take
for ever, so whatever is not plainly memory is asked in a thread, with a limit.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from virtio.errors import HostError
from virtio.native.memory import file_system
from virtio.waist import MemoryRegion

ANSWER_SECONDS: Final = 2.0
THREADS_MAX: Final = 4
"""Of one device: those that a file system keeps are not given back before it answers."""

REMOTE: Final[Mapping[int, str]] = {
    0x6573_5546: "FUSE",
    0x6969: "NFS",
    0x0102_1997: "9p",
    0xFF53_4D42: "CIFS",
    0xFE53_4D42: "SMB",
    0x517B: "SMB",
    0x00C3_6400: "Ceph",
    0x5346_414F: "AFS",
    0x6B41_4653: "AFS",
    0x7375_7245: "Coda",
    0x0BD0_0BD0: "Lustre",
    0x1983_0326: "BeeGFS",
    0x4750_4653: "GPFS",
    0x0116_1970: "GFS2",
    0x7461_636F: "OCFS2",
    0x786F_4256: "VirtualBox's shared folders",
}
"""Magic numbers (statfs(2), linux/magic.h) of file systems that another process or host serves."""


class MemoryFiles:
    """Looks at the files of one device's guest memory. ``allow_remote``: the operator wants them all."""

    def __init__(self, *, allow_remote: bool = False) -> None:
        self._allow_remote = allow_remote
        self._threads = trio.CapacityLimiter(THREADS_MAX)

    async def check(self, regions: Sequence[MemoryRegion]) -> None:
        """``HostError``: one of them must not be used. The descriptors of others may be closed at once from now on."""
        for region in regions:
            if region.fd.may_block:
                await self._ask(region)

    async def _ask(self, region: MemoryRegion) -> None:
        kind = None
        with trio.move_on_after(ANSWER_SECONDS):
            number = region.fd.fileno()
            kind = await trio.to_thread.run_sync(file_system, number, abandon_on_cancel=True, limiter=self._threads)
        where = f"memory region at {region.gpa:#x}: its file"
        if kind is None:
            raise HostError(
                f"{where} is on a file system that has not answered for {ANSWER_SECONDS:g} seconds",
                errno=errno.ETIMEDOUT,
            )
        name = REMOTE.get(kind)
        if name is None:
            region.fd.may_block = False
        elif not self._allow_remote:
            raise HostError(
                f"{where} is on {name}, whose pages come from another process or host and may never come; let the "
                "front-end use memory (memfd), or set remote_memory = true for this device",
                errno=errno.EOPNOTSUPP,
            )
