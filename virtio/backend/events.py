"""What a device's back end has to tell its transport, in order; bounded, however long nobody asks.

A device may change its configuration a thousand times while the transport is busy, and the transport reads the space
once. So an event that is waiting is not added again: what waits is at most one of each kind and queue.
"""

from __future__ import annotations

import trio

from virtio.waist import Event


class Events:
    """Waiting events; one task at a time asks for the next."""

    def __init__(self) -> None:
        self._waiting: dict[Event, None] = {}
        self._added = trio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, event: Event) -> None:
        self._waiting[event] = None
        self._added.set()

    def clear(self) -> None:
        self._waiting.clear()

    async def next(self) -> Event:
        """The oldest. Waits where there is none."""
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            self._added = trio.Event()
            await self._added.wait()
            # A task that was woken and then cancelled must not take an event along.
            await trio.lowlevel.checkpoint_if_cancelled()
        event = next(iter(self._waiting))
        del self._waiting[event]
        return event
