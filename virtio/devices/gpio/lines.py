"""The lines of a GPIO device as its back ends provide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

# 5.18.6: directions and interrupt types as they travel.
VIRTIO_GPIO_DIRECTION_NONE: Final = 0
VIRTIO_GPIO_DIRECTION_OUT: Final = 1
VIRTIO_GPIO_DIRECTION_IN: Final = 2

VIRTIO_GPIO_IRQ_TYPE_NONE: Final = 0
VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING: Final = 1
VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING: Final = 2
VIRTIO_GPIO_IRQ_TYPE_EDGE_BOTH: Final = 3
VIRTIO_GPIO_IRQ_TYPE_LEVEL_HIGH: Final = 4
VIRTIO_GPIO_IRQ_TYPE_LEVEL_LOW: Final = 8

Edge = Callable[[int, bool], None]
"""Called with a watched line's number when it has risen (True) or fallen."""


class Lines(Protocol):
    """Lines by their numbers, which count from 0. What the host refuses raises ``HostError``."""

    names: Sequence[str]
    """One for each line; "" for a line that has none."""
    on_edge: Edge
    """Set by the device; may be called from the moment ``watch`` was asked for."""

    async def direction(self, line: int) -> int: ...
    async def set_direction(self, line: int, direction: int) -> None:
        """NONE gives the line back and forgets all about it, the value it was to have too (5.18.6.9)."""

    async def value(self, line: int) -> bool: ...
    async def set_value(self, line: int, value: bool) -> None:
        """The value of an output, or what it will begin with once it is one (5.18.6.5)."""

    async def watch(self, line: int, interrupt_type: int) -> None:
        """Tell edges of the line from now on, those that matter to ``interrupt_type``; both for a level. NONE: stop."""

    def reset(self) -> None:
        """All lines as they were before a driver came."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...
    def close(self) -> None: ...
