"""Where the devices of our own VM are: registers, interrupt, notify port, and bells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WINDOWS_GPA: Final = 0xD000_0000
WINDOW_STEP: Final = 0x1000
FIRST_PORT: Final = 0x1000
FIRST_BELL: Final = 0x100
QUEUES_WITH_BELL: Final = 0x100

_GSIS: Final[tuple[int, ...]] = (*range(16, 24), 5, 6, 7, 10, 11, 12, 14, 15)
"""Inputs of the I/O APIC, which has 24: first those that no ISA device ever had, then what a PC without any leaves."""
DEVICES_MAX: Final = len(_GSIS)


@dataclass(frozen=True, slots=True)
class Slot:
    """Place number ``index``."""

    index: int
    gpa: int
    gsi: int
    port: int

    def bell(self, queue_index: int) -> int:
        """The queue's bell number: below 0x10000, where no port's are (DOORBELLS.md); 0: it has none."""
        return FIRST_BELL + (self.index << 8) + queue_index if queue_index < QUEUES_WITH_BELL else 0


def gsi_of(index: int) -> int:
    """The interrupt of device ``index``: edge-triggered, active high."""
    return _GSIS[index]


def slot(index: int) -> Slot:
    """``IndexError``: there is no such place."""
    if not 0 <= index < DEVICES_MAX:
        raise IndexError(f"device {index}: there are places for {DEVICES_MAX}")
    return Slot(index, WINDOWS_GPA + index * WINDOW_STEP, gsi_of(index), FIRST_PORT + index * 2)
