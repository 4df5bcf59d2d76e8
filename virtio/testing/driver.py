"""The driver's side of a virtqueue, in plain Python over shared memory: what a guest kernel does, split and packed.

Used wherever something must play the guest: device tests, vhost-user integration tests, our own virtio-mmio. It
imports nothing of the project, so that both sides never share a mistake. Sections 2.7 and 2.8 of the specification.

Everything that a driver may get wrong can be got wrong here on purpose: every field of a ring can be read and
written by hand (``read_desc``, ``write_desc``, ``put_avail``, ``set_avail_idx``, ``put_descs``).
"""

from __future__ import annotations

from virtio.testing.guest_memory import GuestMemory, full_fence
from virtio.testing.packed_driver import PackedDriver
from virtio.testing.split_driver import SplitDriver
from virtio.testing.virtqueue_driver import (
    Desc,
    DeviceBrokeSpecError,
    Element,
    RingFullError,
    Used,
    VirtqueueDriver,
    need_event,
)

__all__ = [
    "Desc",
    "DeviceBrokeSpecError",
    "Element",
    "GuestMemory",
    "PackedDriver",
    "RingFullError",
    "SplitDriver",
    "Used",
    "VirtqueueDriver",
    "full_fence",
    "need_event",
]
