"""InterruptStatus of virtio-mmio: the word that workers, the event loop and a vCPU thread share."""

from __future__ import annotations

from typing import Any

from virtio.dataplane import ffi, lib
from virtio.errors import HostError


class InterruptStatus:
    """One 32-bit word (virtio 1.3, 4.2.2, InterruptStatus), kept in C for as long as this object or a queue needs it.

    A queue that was given one sets bit 0 before it signals its call eventfd. Any thread may use any method.
    """

    def __init__(self) -> None:
        pointer = lib.interrupt_status_new()
        if pointer == ffi.NULL:
            raise HostError("no memory for an InterruptStatus register")
        self.pointer: Any = ffi.gc(pointer, lib.interrupt_status_unref)

    @property
    def address(self) -> int:
        """Where the word is in this process, for a vCPU thread that serves the register; valid while this lives."""
        return int(ffi.cast("uintptr_t", lib.interrupt_status_word(self.pointer)))

    @property
    def value(self) -> int:
        value: int = lib.interrupt_status_value(self.pointer)
        return value

    def raise_config(self) -> None:
        """Set bit 1: the configuration changed. Before the interrupt is raised, as with bit 0."""
        lib.interrupt_status_raise(self.pointer, lib.INTERRUPT_CONFIG_CHANGE)

    def acknowledge(self, bits: int) -> None:
        """Clear ``bits``, as a write to InterruptACK does."""
        lib.interrupt_status_acknowledge(self.pointer, bits)

    def clear(self) -> None:
        """4.2.2.1: a reset clears all bits."""
        self.acknowledge(0xFFFF_FFFF)
