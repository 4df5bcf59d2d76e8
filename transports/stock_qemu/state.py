"""What is shown of stock QEMU's VMs: plain values, for metrics and the control socket."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BellState:
    """A doorbell of a VM that is a queue of ours. ``error``: the name of the error KVM refused its id with, or ""."""

    bell: int
    device: str
    queue: int
    registered: bool
    error: str


@dataclass(frozen=True, slots=True)
class VmState:
    """One VM whose QEMU is connected. ``reason``: why it has no ids; "" when nothing speaks against them.

    ``hypercalls`` is KVM's own count, of all kinds. ``since`` is wall clock time in seconds.
    """

    name: str
    pid: int
    since: float
    key_shown: bool
    key_stable: bool
    may_nest: bool
    reason: str
    vcpus: int
    hypercalls: int
    bells: tuple[BellState, ...]
