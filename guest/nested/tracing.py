"""What a level's KVM saw of its guests' doorbells, counted in its kernel (histogram triggers), so that nothing is lost.

A VMMCALL that a guest makes for Hyper-V, a doorbell that ended in an eventfd, and every exit of a guest's own guest.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from guest.nested.level import Level

TRACING = "/sys/kernel/tracing"
EVENTS = {
    # ioeventfd_write(vcpu, device, addr, len, val): called only when address and length are those of an ioeventfd.
    "ioeventfds": ("hyperbell/ioeventfd_write", "address"),
    "hypercalls": ("kvm/kvm_hv_hypercall", "ingpa"),  # of a fast call it is the input itself: the connection id
    "nested_exits": ("kvm/kvm_nested_vmexit", "exit_reason"),
    "interrupts": ("kvm/kvm_msi_set_irq", "data"),
}
ENTRY = re.compile(r"\{ \w+:\s*([0-9a-f]+) *\} hitcount:\s*(\d+)")


@dataclass(frozen=True)
class Counts:
    """How often each was seen: by address (a port when below 0x10000), connection id, exit code, MSI data."""

    ioeventfds: dict[int, int] = field(default_factory=dict)
    hypercalls: dict[int, int] = field(default_factory=dict)
    nested_exits: dict[int, int] = field(default_factory=dict)
    interrupts: dict[int, int] = field(default_factory=dict)

    def since(self, earlier: Counts) -> Counts:
        """What came after ``earlier``; what did not come is left out."""

        def less(now: dict[int, int], then: dict[int, int]) -> dict[int, int]:
            return {key: now[key] - then.get(key, 0) for key in now if now[key] != then.get(key, 0)}

        return Counts(*(less(getattr(self, name), getattr(earlier, name)) for name in EVENTS))


class Trace:
    """A trace that runs in ``level``."""

    def __init__(self, level: Level) -> None:
        self._level = level

    async def counts(self) -> Counts:
        """All since the trace began."""
        commands = [f"echo == {name}; cat {TRACING}/events/{EVENTS[name][0]}/hist" for name in EVENTS]
        answer = await self._level.run(";".join(commands))
        found: dict[str, dict[int, int]] = {}
        for line in answer.lines:
            if line.startswith("== "):
                current = found.setdefault(line[3:], {})
            elif match := ENTRY.search(line):
                current[int(match[1], 16)] = int(match[2])
            elif match := re.search(r"Dropped: (\d+)", line):
                assert int(match[1]) == 0, f"the trace lost {match[1]} of {current}"
        return Counts(**found)


@asynccontextmanager
async def watch_doorbells(level: Level) -> AsyncIterator[Trace]:
    """Trace in ``level`` until the block is left."""
    probe = "p:hyperbell/ioeventfd_write ioeventfd_write address=%dx:x64"
    arm = [f"echo '{probe}' >>{TRACING}/kprobe_events"]
    disarm = []
    for event, key in EVENTS.values():
        trigger = f"{TRACING}/events/{event}/trigger"
        arm.append(f"echo 'hist:keys={key}.hex' >{trigger}")
        disarm.append(f"echo '!hist:keys={key}.hex' >{trigger}")
    disarm.append(f"echo '-:hyperbell/ioeventfd_write' >>{TRACING}/kprobe_events")
    await level.run(" && ".join(arm))
    try:
        yield Trace(level)
    finally:
        if not level.lost:
            await level.run(";".join(disarm))
