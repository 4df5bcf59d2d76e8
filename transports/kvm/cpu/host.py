"""What the processor under this process is, as far as it decides whether a measurement here means anything."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Final

from transports.kvm.native import ffi, lib

_HYPERVISOR_BIT: Final = 1 << 31  # CPUID.1 ECX: this machine is a guest
_HYPERVISOR_LEAF: Final = 0x4000_0000
_AMD: Final = frozenset({"AuthenticAMD", "HygonGenuine"})

HYPERVISORS: Final = {
    "TCGTCGTCGTCG": "QEMU's TCG",
    "KVMKVMKVM": "KVM",
    "Linux KVM Hv": "KVM",
    "Microsoft Hv": "Hyper-V",
    "VMwareVMware": "VMware",
    "XenVMMXenVMM": "Xen",
    "bhyve bhyve ": "bhyve",
}
"""Names by what CPUID says (leaf 0x40000000)."""

EMULATOR: Final = "QEMU's TCG"


def _text(*registers: int) -> str:
    return struct.pack(f"<{len(registers)}I", *registers).decode("latin-1").rstrip("\0")


def speaks_vmmcall() -> bool:
    """Whether a guest here makes hypercalls by AMD's instruction rather than Intel's."""
    entry = ffi.new("struct cpuid_entry *")
    lib.host_cpuid(0, 0, entry)
    return _text(entry.ebx, entry.edx, entry.ecx) in _AMD


def hypervisor_below() -> str:
    """The hypervisor whose guest this machine is; "" when none shows itself."""
    entry = ffi.new("struct cpuid_entry *")
    lib.host_cpuid(1, 0, entry)
    if not entry.ecx & _HYPERVISOR_BIT:
        return ""
    lib.host_cpuid(_HYPERVISOR_LEAF, 0, entry)
    signature = _text(entry.ebx, entry.ecx, entry.edx)
    return HYPERVISORS.get(signature, ascii(signature))


def processor_name() -> str:
    """The brand string, as /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "an unknown processor")


def two_cpus(usable: Collection[int], folder: Path = Path("/sys/devices/system/cpu")) -> tuple[int, int] | None:
    """Two CPUs of ``usable``, of two cores where that can be; ``None`` when there is only one."""
    numbers = sorted(usable)
    if len(numbers) < 2:
        return None
    first = numbers[0]
    siblings = _siblings(first, folder)
    other = next((number for number in numbers[1:] if number not in siblings), numbers[1])
    return first, other


def _siblings(cpu: int, folder: Path) -> frozenset[int]:
    """The CPUs of the same core."""
    try:
        text = (folder / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return frozenset()
    siblings: set[int] = set()
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        siblings.update(range(int(low), int(high or low) + 1))
    return frozenset(siblings)


def usable_cpus() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


def host_loop_cycles(iterations: int, tries: int = 20) -> int:
    """The least cycles in which this process runs the guest's loop."""
    return min(int(lib.host_loop(iterations)) for _ in range(tries))
