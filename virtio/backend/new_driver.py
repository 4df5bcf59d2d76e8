"""Whether the driver that starts a device's queues is the one that stopped them, or another, without a reset between.

QEMU (7.2 to 11.1) tells the back-end of a generic device, and up to 7.2 of any, of no reset: when a guest reboots it
disables the rings, asks for their bases, as at a mere pause, and sets them up again. User-mode Linux only disables
them. What differs is where they begin: the same driver continues where its rings stopped. To take a pause for a reboot
would cost a guest its connections, so whatever is in doubt is the same driver.
"""

from __future__ import annotations

from collections.abc import Sequence

from virtio.backend.queue import BackendQueue
from virtio.native.pump import BEGINNINGS


class DriverWatch:
    """Told how ``queues``, all of the device's, stop and are set up."""

    def __init__(self, queues: Sequence[BackendQueue]) -> None:
        self._queues = queues
        self._left: dict[int, int] = {}  # where the queues stand that are not at their beginning
        self._all_stood = False  # since then, no driver was recognized
        self._negotiated = False  # since all stood

    def forget(self) -> None:
        """There was a reset, or there is no doubt any more."""
        self._left.clear()
        self._all_stood = self._negotiated = False

    def stopped(self, queue: BackendQueue, *, ran: bool) -> None:
        """``ran``: it ran until now; else it stood already, and where is told once more."""
        index, base = queue.vq.index, queue.vq.base
        if base in BEGINNINGS:
            # Never used, or its index has wrapped to the very beginning: it will tell nothing.
            self._left.pop(index, None)
        else:
            self._left[index] = base
        if not any(each.running for each in self._queues) and (ran or not self._all_stood):
            self._all_stood, self._negotiated = True, False

    def negotiated(self) -> None:
        """A front-end gives the features whenever it starts a device, and not when it resets a queue (2.6.1)."""
        self._negotiated = True

    def begins_anew(self, queue: BackendQueue) -> bool:
        """``queue`` has been set up: by another driver than the one that left it?"""
        left = self._left.pop(queue.vq.index, None)
        if not (self._all_stood and self._negotiated):
            return False
        if queue.vq.base not in BEGINNINGS or self._is_at_work():
            self.forget()
            return False
        if left is None:
            return False  # it was at its beginning and still is
        self.forget()
        return True

    def _is_at_work(self) -> bool:
        """A driver has used queues that run already, so it began before."""
        return any(queue.running and queue.vq.base not in BEGINNINGS for queue in self._queues)
