"""What is shown of our own VM and its devices: plain values, for metrics and the control socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QueueBell:
    """A queue's hypercall doorbell. ``bell`` 0: it has no number. ``registered``: its connection id is in KVM, so the
    guest can ring it. ``accepted``: the driver said that it may do so."""

    queue: int
    bell: int
    registered: bool
    accepted: bool


@dataclass(frozen=True, slots=True)
class MmioDeviceState:
    """One device. ``stray_doorbells``: rings of queues that it does not have. ``refusals``: how often a queue was to be
    offered the hypercall and could not, by the name of the error."""

    bells: tuple[QueueBell, ...]
    stray_doorbells: int
    refusals: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MachineState:
    """What belongs to no device. ``reason``: why no device can offer the hypercall; "" when nothing speaks against it.

    ``unknown_memory`` and ``unknown_ports`` count accesses to where there is nothing. An honest kernel makes some when
    it looks for devices. ``refused_hypercalls`` are of ids that nobody registered, as far as KVM passes them on.
    """

    key_shown: bool
    reason: str
    refused_hypercalls: int
    unknown_memory: int
    unknown_ports: int
