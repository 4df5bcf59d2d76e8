"""The entropy device (section 5.4): the host kernel's random bytes."""

from __future__ import annotations

import os
from typing import ClassVar, Final

from virtio import spec
from virtio.device import Chain, Device, Queue

MAX_BYTES: Final = 64 * 1024
"""Most bytes a single request gets, so that one guest's appetite does not hold up the others (5.4.6.2 allows less)."""


class Rng(Device):
    """Fills what the driver makes available with bytes from getrandom()."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_RNG
    type_name = "rng"
    answers_in_order = True
    ops = ("read",)
    request_max = spec.CHAIN_LENGTH_MAX  # no harm in a large buffer: it gets MAX_BYTES

    async def handle(self, queue: Queue, chain: Chain) -> None:
        """5.4.6.1: the driver's buffers are device-writable only, and get at least one byte."""
        chain.failed = chain.writable_length == 0
        chain.write(os.urandom(min(chain.writable_length, MAX_BYTES)))
