"""What a guest's CPUID says: the host's list, with the processor's own number, and the platform key where it is wanted.

Pure: entries in, entries out. A KVM guest without a platform key sees what KVM supports, at the leaves where KVM has
it. With one, "Microsoft Hv" comes first (KVM takes Hyper-V's hypercalls only from guests that can see it), KVM's own
leaves follow, then ours; Linux takes the highest of the first two that it knows, which is KVM's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from transports.hypercall import HIDDEN_PV_BITS, LEAF_FIRST, LEAF_STEP, platform_leaves

SUBLEAF_COUNTS: Final = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

FEATURES: Final = 0x1
FEATURES_ECX_VMX: Final = 1 << 5
FEATURES_ECX_TSC_DEADLINE: Final = 1 << 24
FEATURES_ECX_HYPERVISOR: Final = 1 << 31
FEATURES_EDX_HTT: Final = 1 << 28
CACHES: Final = 0x4
TOPOLOGY_LEAVES: Final = (0xB, 0x1F)
LEVEL_SMT: Final = 1
LEVEL_CORE: Final = 2
EXTENDED_FEATURES: Final = 0x8000_0001
EXTENDED_ECX_CMP_LEGACY: Final = 1 << 1
EXTENDED_ECX_SVM: Final = 1 << 2
EXTENDED_ECX_TOPOLOGY: Final = 1 << 22
AMD_SIZES: Final = 0x8000_0008
AMD_SVM: Final = 0x8000_000A
AMD_TOPOLOGY: Final = 0x8000_001E
AMD_SIGNATURES: Final = (b"AuthenticAMD", b"HygonGenuine")

KVM_SIGNATURE: Final = b"KVMKVMKVM\0\0\0"
HYPERVISOR_RANGE: Final = range(LEAF_FIRST, LEAF_FIRST + 0x1_0000)

HYPERV_SIGNATURE: Final = b"Microsoft Hv"
HYPERV_INTERFACE: Final = int.from_bytes(b"Hv#1", "little")
HYPERV_LAST: Final = LEAF_FIRST + 5
HYPERV_EAX_HYPERCALL_MSRS: Final = 1 << 5  # GUEST_OS_ID, which must not be 0 for a hypercall, is one of them
HYPERV_EAX_VP_INDEX: Final = 1 << 6
HYPERV_EBX_SIGNAL_EVENTS: Final = 1 << 5


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One entry of KVM_SET_CPUID2."""

    leaf: int
    subleaf: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


@dataclass(frozen=True, slots=True)
class PlatformKey:
    """The key of a VM that gets the hypercall doorbell (``transports.hypercall``). Not ``offered``: withheld."""

    key: int
    offered: bool = True


@dataclass(frozen=True, slots=True)
class CpuidSetup:
    """What every vCPU of a VM has in common."""

    vcpus: int = 1
    nested: bool = False
    tsc_deadline: bool = False
    platform: PlatformKey | None = None


def guest_cpuid(supported: Sequence[CpuidEntry], vcpu: int, setup: CpuidSetup) -> tuple[CpuidEntry, ...]:
    """The entries for one vCPU, from those that KVM supports."""
    entries = with_place(supported, vcpu, setup.vcpus)
    entries = with_features(entries, tsc_deadline=setup.tsc_deadline)
    if not setup.nested:
        entries = without_nesting(entries)
    if setup.platform is not None:
        entries = with_platform(entries, setup.platform)
    return tuple(entries)


def guest_may_nest(entries: Iterable[CpuidEntry]) -> bool:
    """Whether a guest with these entries is shown VMX or SVM, and so may be a hypervisor itself."""
    return any(
        (entry.leaf == FEATURES and entry.ecx & FEATURES_ECX_VMX)
        or (entry.leaf == EXTENDED_FEATURES and entry.ecx & EXTENDED_ECX_SVM)
        for entry in entries
    )


def signature_of(entry: CpuidEntry, order: str = "bcd") -> bytes:
    """Twelve bytes in EBX, ECX, EDX (hypervisors) or EBX, EDX, ECX (processors)."""
    registers = {"b": entry.ebx, "c": entry.ecx, "d": entry.edx}
    return b"".join(registers[name].to_bytes(4, "little") for name in order)


def _changed(
    entries: Iterable[CpuidEntry], leaf: int, change: Callable[[CpuidEntry], CpuidEntry]
) -> tuple[CpuidEntry, ...]:
    return tuple(change(entry) if entry.leaf == leaf else entry for entry in entries)


def with_place(entries: Sequence[CpuidEntry], vcpu: int, vcpus: int) -> tuple[CpuidEntry, ...]:
    """Processor ``vcpu`` of ``vcpus``: one package of so many cores with one thread each, APIC id = number."""
    id_bits = (vcpus - 1).bit_length()
    several = vcpus > 1
    last_leaf = max((entry.eax for entry in entries if entry.leaf == 0), default=0)
    amd = any(entry.leaf == 0 and signature_of(entry, "bdc") in AMD_SIGNATURES for entry in entries)
    amd_topology = amd and any(
        entry.leaf == EXTENDED_FEATURES and entry.ecx & EXTENDED_ECX_TOPOLOGY for entry in entries
    )
    kept = tuple(entry for entry in entries if entry.leaf not in TOPOLOGY_LEAVES)

    def features(entry: CpuidEntry) -> CpuidEntry:
        edx = entry.edx | FEATURES_EDX_HTT if several else entry.edx & ~FEATURES_EDX_HTT
        return replace(entry, ebx=entry.ebx & 0xFFFF | min(vcpus, 0xFF) << 16 | vcpu << 24, edx=edx)

    def caches(entry: CpuidEntry) -> CpuidEntry:
        if entry.eax & 0x1F == 0:  # no further cache
            return entry
        return replace(entry, eax=entry.eax & 0x03FF_FFFF | ((1 << id_bits) - 1) << 26)

    kept = _changed(_changed(kept, FEATURES, features), CACHES, caches)
    if amd:
        legacy = EXTENDED_ECX_CMP_LEGACY if several else 0
        sizes = vcpus - 1 | id_bits << 12
        kept = _changed(kept, EXTENDED_FEATURES, lambda e: replace(e, ecx=e.ecx & ~EXTENDED_ECX_CMP_LEGACY | legacy))
        kept = _changed(kept, AMD_SIZES, lambda e: replace(e, ecx=sizes))
    if amd_topology:
        kept = _changed(kept, AMD_TOPOLOGY, lambda e: replace(e, eax=vcpu, ebx=vcpu, ecx=0, edx=0))
    for leaf in TOPOLOGY_LEAVES:
        if leaf <= last_leaf:
            kept += (
                CpuidEntry(leaf, 0, SUBLEAF_COUNTS, eax=0, ebx=1, ecx=0 | LEVEL_SMT << 8, edx=vcpu),
                CpuidEntry(leaf, 1, SUBLEAF_COUNTS, eax=id_bits, ebx=vcpus, ecx=1 | LEVEL_CORE << 8, edx=vcpu),
                CpuidEntry(leaf, 2, SUBLEAF_COUNTS, ecx=2, edx=vcpu),
            )
    return kept


def with_features(entries: Iterable[CpuidEntry], *, tsc_deadline: bool) -> tuple[CpuidEntry, ...]:
    """KVM leaves two bits to us: that there is a hypervisor, and the APIC's TSC deadline (a capability of its own)."""
    bits = FEATURES_ECX_HYPERVISOR | (FEATURES_ECX_TSC_DEADLINE if tsc_deadline else 0)
    return _changed(entries, FEATURES, lambda e: replace(e, ecx=e.ecx & ~FEATURES_ECX_TSC_DEADLINE | bits))


def without_nesting(entries: Iterable[CpuidEntry]) -> tuple[CpuidEntry, ...]:
    """A guest that cannot be a hypervisor itself."""
    kept = _changed(entries, FEATURES, lambda e: replace(e, ecx=e.ecx & ~FEATURES_ECX_VMX))
    kept = _changed(kept, EXTENDED_FEATURES, lambda e: replace(e, ecx=e.ecx & ~EXTENDED_ECX_SVM))
    return _changed(kept, AMD_SVM, lambda e: CpuidEntry(e.leaf, e.subleaf, e.flags))


def with_platform(entries: Sequence[CpuidEntry], platform: PlatformKey) -> tuple[CpuidEntry, ...]:
    """Hyper-V's leaves, KVM's behind them without the hypercalls that would go astray, then the platform leaf."""
    native = tuple(entry for entry in entries if entry.leaf not in HYPERVISOR_RANGE)
    kvm_base = LEAF_FIRST + LEAF_STEP
    kvm = _kvm_leaves(entries, kvm_base)
    ours_base = kvm_base + LEAF_STEP if kvm else kvm_base
    ours = (
        CpuidEntry(leaf.function, eax=leaf.eax, ebx=leaf.ebx, ecx=leaf.ecx, edx=leaf.edx)
        for leaf in platform_leaves(ours_base, platform.key, offered=platform.offered)
    )
    return (*native, *_hyperv_leaves(), *kvm, *ours)


def _hyperv_leaves() -> tuple[CpuidEntry, ...]:
    name = [int.from_bytes(HYPERV_SIGNATURE[at : at + 4], "little") for at in (0, 4, 8)]
    return (
        CpuidEntry(LEAF_FIRST, eax=HYPERV_LAST, ebx=name[0], ecx=name[1], edx=name[2]),
        CpuidEntry(LEAF_FIRST + 1, eax=HYPERV_INTERFACE),
        CpuidEntry(LEAF_FIRST + 2),  # its version: none
        CpuidEntry(
            LEAF_FIRST + 3,
            eax=HYPERV_EAX_HYPERCALL_MSRS | HYPERV_EAX_VP_INDEX,
            ebx=HYPERV_EBX_SIGNAL_EVENTS,
        ),
        CpuidEntry(LEAF_FIRST + 4),  # recommendations: none
        CpuidEntry(LEAF_FIRST + 5),  # limits: none
    )


def _kvm_leaves(entries: Iterable[CpuidEntry], base: int) -> tuple[CpuidEntry, ...]:
    """KVM's leaves as supported, moved to ``base``."""
    hypervisors = {entry.leaf: entry for entry in entries if entry.leaf in HYPERVISOR_RANGE}
    old_base = next((leaf for leaf, entry in hypervisors.items() if signature_of(entry) == KVM_SIGNATURE), None)
    if old_base is None:
        return ()
    hidden = sum(1 << bit for bit in HIDDEN_PV_BITS)
    moved = []
    for leaf, entry in hypervisors.items():
        place = leaf - old_base
        if not 0 <= place < LEAF_STEP:
            continue
        eax = entry.eax
        if place == 0:
            eax = base + (max(eax, old_base + 1) - old_base)  # an old KVM says 0 here for the one leaf it has
        elif place == 1:
            eax &= ~hidden
        moved.append(replace(entry, leaf=base + place, eax=eax))
    return tuple(moved)
