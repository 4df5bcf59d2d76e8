"""How a VM ended, in words and numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final, Literal

from transports.kvm.native import lib

EndKind = Literal["exit", "power off", "reset", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class VmEnd:
    """``status``: what the guest wrote to the exit port (kind "exit"); ``reason``: one line for people."""

    kind: EndKind
    status: int = 0
    reason: str = ""


EXIT_FAIL_ENTRY: Final = 9
EXIT_INTERNAL_ERROR: Final = 17
_EXIT_NAMES: Final = {
    0: "unknown hardware exit",
    4: "debug exit",
    5: "halt without an interrupt controller",
    EXIT_FAIL_ENTRY: "the processor refused to enter the guest",
    EXIT_INTERNAL_ERROR: "KVM internal error",
    24: "system event",
    39: "memory fault",
}
_SUBERRORS: Final = {
    1: "an instruction that KVM cannot emulate",
    2: "an exception while another was delivered",
    3: "an exit while an exception was delivered",
    4: "an exit that KVM does not know",
}


def describe_end(end: Any) -> VmEnd:
    """A ``struct vm_end`` of the machine's C."""
    if end.kind == lib.VM_END_EXIT:
        return VmEnd("exit", end.status, f"the guest ended with status {end.status}")
    if end.kind == lib.VM_END_POWER_OFF:
        return VmEnd("power off", reason="the guest switched itself off")
    if end.kind == lib.VM_END_RESET:
        if end.status == lib.VM_RESET_TRIPLE_FAULT:
            return VmEnd("reset", reason="the guest broke down: a triple fault")
        return VmEnd("reset", reason="the guest asked for a reset")
    return VmEnd("failed", reason=f"vCPU {end.vcpu} cannot run on: {_failure(end)} (at RIP {end.rip:#x})")


def _failure(end: Any) -> str:
    if end.error:
        return f"KVM_RUN: {os.strerror(-end.error)}"
    data = [int(word) for word in end.data[0 : end.words]]
    name = _EXIT_NAMES.get(end.exit_reason, f"exit {end.exit_reason}")
    if end.exit_reason == EXIT_FAIL_ENTRY:
        return f"{name}: reason {data[0]:#x} on CPU {data[1]}"
    if end.exit_reason == EXIT_INTERNAL_ERROR:
        return f"{name} {data[0]} ({_SUBERRORS.get(data[0], 'unknown')}){_details(data)}"
    return f"{name}: {data[0]:#x}"


def _details(data: list[int]) -> str:
    suberror, words = data[0], data[1:]
    if suberror == 1 and len(words) >= 3 and words[0] & 1:  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        raw = words[1].to_bytes(8, "little") + words[2].to_bytes(8, "little")
        return f": bytes {raw[1 : 1 + raw[0]].hex(' ')}"
    return ": " + " ".join(f"{word:#x}" for word in words) if words else ""
