"""What a guest's CPUID says, from what KVM supports: its own number, no nesting unless wanted, the platform key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from transports.kvm.cpu.cpuid import (
    FEATURES_ECX_HYPERVISOR,
    FEATURES_ECX_TSC_DEADLINE,
    FEATURES_ECX_VMX,
    FEATURES_EDX_HTT,
    SUBLEAF_COUNTS,
    CpuidEntry,
    CpuidSetup,
    PlatformKey,
    guest_cpuid,
    guest_may_nest,
    signature_of,
)

KVM_FEATURES = 0x0100_7EFB
PLATFORM = PlatformKey(0x123456)


def name(text: bytes, order: str = "bcd") -> dict[str, int]:
    return {f"e{r}x": int.from_bytes(text[4 * i : 4 * i + 4], "little") for i, r in enumerate(order)}


def supported(vendor: bytes = b"AuthenticAMD", last: int = 0x1F) -> tuple[CpuidEntry, ...]:
    """As KVM says it of a processor that can do all of it."""
    return (
        CpuidEntry(0, eax=last, **name(vendor, "bdc")),
        CpuidEntry(1, eax=0xA10F11, ebx=0x3702_0800, ecx=FEATURES_ECX_VMX | 0x200, edx=0x078B_FBFF),
        CpuidEntry(4, 0, SUBLEAF_COUNTS, eax=0xFC00_4121, ebx=0x1C0003F, ecx=0x3F),
        CpuidEntry(4, 1, SUBLEAF_COUNTS),
        CpuidEntry(0xB, 0, SUBLEAF_COUNTS, edx=77),
        CpuidEntry(0x1F, 0, SUBLEAF_COUNTS, edx=77),
        CpuidEntry(0x4000_0000, eax=0x4000_0001, **name(b"KVMKVMKVM\0\0\0")),
        CpuidEntry(0x4000_0001, eax=KVM_FEATURES),
        CpuidEntry(0x8000_0000, eax=0x8000_0021),
        CpuidEntry(0x8000_0001, ecx=0x0040_0397, edx=0x23D3_FBFF),
        CpuidEntry(0x8000_0008, eax=0x3030, ecx=0x7001),
        CpuidEntry(0x8000_000A, eax=1, ebx=16, edx=0x1000),
        CpuidEntry(0x8000_001E, eax=3, ebx=0x101, ecx=0x200),
    )


def entry(entries: tuple[CpuidEntry, ...], leaf: int, subleaf: int = 0) -> CpuidEntry:
    (found,) = [e for e in entries if (e.leaf, e.subleaf) == (leaf, subleaf)]
    return found


@pytest.mark.parametrize("vcpu", [0, 1, 4])
def test_each_vcpu_finds_its_own_number_in_every_leaf_that_has_it(vcpu: int) -> None:
    entries = guest_cpuid(supported(), vcpu, CpuidSetup(vcpus=5))
    assert entry(entries, 1).ebx >> 24 == vcpu
    for leaf in (0xB, 0x1F):
        assert [entry(entries, leaf, level).edx for level in range(3)] == [vcpu] * 3
    assert entry(entries, 0x8000_001E).eax == vcpu
    assert entry(entries, 0x8000_001E).ebx == vcpu


def test_the_topology_is_one_package_of_cores_with_one_thread() -> None:
    entries = guest_cpuid(supported(), 0, CpuidSetup(vcpus=5))
    assert entry(entries, 1).ebx >> 16 & 0xFF == 5
    assert entry(entries, 1).ebx & 0xFFFF == 0x0800
    assert entry(entries, 1).edx & FEATURES_EDX_HTT
    smt, core, end = (entry(entries, 0xB, level) for level in range(3))
    assert (smt.eax, smt.ebx, smt.ecx) == (0, 1, 0x100)
    assert (core.eax, core.ebx, core.ecx) == (3, 5, 0x201)
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
    assert all(level.flags == SUBLEAF_COUNTS for level in (smt, core, end))
    assert entry(entries, 0x8000_0008).ecx == 4 | 3 << 12
    assert entry(entries, 0x8000_0001).ecx & 2
    assert entry(entries, 4).eax == 0x4121 | 7 << 26
    assert entry(entries, 4, 1).eax == 0


def test_a_single_vcpu_is_not_told_of_others() -> None:
    entries = guest_cpuid(supported(), 0, CpuidSetup())
    assert entry(entries, 1).edx & FEATURES_EDX_HTT == 0
    assert entry(entries, 0x8000_0001).ecx & 2 == 0
    assert entry(entries, 0x8000_0008).ecx == 0
    assert entry(entries, 0xB, 1).eax == 0


def test_a_processor_without_leaf_0x1f_does_not_get_one() -> None:
    entries = guest_cpuid(supported(last=0xD), 0, CpuidSetup(vcpus=2))
    assert {e.leaf for e in entries} >= {0xB}
    assert 0x1F not in {e.leaf for e in entries}


def test_leaves_of_amd_alone_stay_as_they_are_elsewhere() -> None:
    entries = guest_cpuid(supported(b"GenuineIntel"), 1, CpuidSetup(vcpus=2))
    assert entry(entries, 0x8000_0008) == entry(supported(), 0x8000_0008)
    assert entry(entries, 0x8000_001E) == entry(supported(), 0x8000_001E)
    assert entry(entries, 0x8000_0001).ecx & 2, "as KVM said it"


def test_vmx_and_svm_are_hidden_unless_nesting_is_wanted() -> None:
    without = guest_cpuid(supported(), 0, CpuidSetup())
    assert not guest_may_nest(without)
    assert entry(without, 1).ecx & 0x200, "nothing else is hidden"
    assert entry(without, 0x8000_000A) == CpuidEntry(0x8000_000A)
    nested = guest_cpuid(supported(), 0, CpuidSetup(nested=True))
    assert guest_may_nest(nested)
    assert entry(nested, 1).ecx & FEATURES_ECX_VMX
    assert entry(nested, 0x8000_0001).ecx & 4
    assert entry(nested, 0x8000_000A) == entry(supported(), 0x8000_000A)


def test_a_host_that_cannot_nest_gives_a_guest_that_may_not_either() -> None:
    plain = tuple(replace(e, ecx=0) if e.leaf in (1, 0x8000_0001) else e for e in supported())
    assert not guest_may_nest(guest_cpuid(plain, 0, CpuidSetup(nested=True)))


@pytest.mark.parametrize("capable", [False, True])
def test_the_tsc_deadline_is_shown_where_the_kernel_has_it(capable: bool) -> None:
    for known in (0, FEATURES_ECX_TSC_DEADLINE):  # newer kernels list the bit by themselves
        list_of_kvm = tuple(replace(e, ecx=e.ecx | known) if e.leaf == 1 else e for e in supported())
        entries = guest_cpuid(list_of_kvm, 0, CpuidSetup(tsc_deadline=capable))
        assert bool(entry(entries, 1).ecx & FEATURES_ECX_TSC_DEADLINE) is capable
        assert entry(entries, 1).ecx & FEATURES_ECX_HYPERVISOR


def test_without_a_platform_key_the_hypervisor_leaves_are_those_of_kvm() -> None:
    entries = guest_cpuid(supported(), 0, CpuidSetup())
    hypervisor = [e for e in entries if e.leaf >> 16 == 0x4000]
    assert hypervisor == [e for e in supported() if e.leaf >> 16 == 0x4000]


def test_the_platform_key_stands_behind_hyperv_and_kvm() -> None:
    entries = guest_cpuid(supported(), 0, CpuidSetup(platform=PLATFORM))
    first = entry(entries, 0x4000_0000)
    assert (signature_of(first), first.eax) == (b"Microsoft Hv", 0x4000_0005)
    assert entry(entries, 0x4000_0001).eax.to_bytes(4, "little") == b"Hv#1"
    assert entry(entries, 0x4000_0003).eax == 0x60
    assert entry(entries, 0x4000_0003).ebx == 0x20
    kvm = entry(entries, 0x4000_0100)
    assert (signature_of(kvm), kvm.eax) == (b"KVMKVMKVM\0\0\0", 0x4000_0101)
    ours = entry(entries, 0x4000_0200)
    assert (signature_of(ours), ours.eax) == (b"HyperBellVMM", 0x4000_0201)
    words = entry(entries, 0x4000_0201)
    assert (words.eax, words.ebx, words.ecx, words.edx) == (1, 0x123456, 1, 0)


def test_calls_of_kvm_that_would_go_astray_are_hidden_with_the_platform_key() -> None:
    entries = guest_cpuid(supported(), 0, CpuidSetup(platform=PLATFORM))
    shown = entry(entries, 0x4000_0101).eax
    assert shown & (1 << 7 | 1 << 11 | 1 << 13 | 1 << 16) == 0
    assert KVM_FEATURES & ~shown == KVM_FEATURES & (1 << 7 | 1 << 11 | 1 << 13 | 1 << 16)


def test_a_withheld_doorbell_leaves_the_key_and_takes_the_flag() -> None:
    entries = guest_cpuid(supported(), 0, CpuidSetup(platform=PlatformKey(0x123456, offered=False)))
    words = entry(entries, 0x4000_0201)
    assert (words.ebx, words.ecx) == (0x123456, 0)


def test_an_old_kvm_that_names_no_last_leaf_keeps_its_features() -> None:
    old = tuple(replace(e, eax=0) if e.leaf == 0x4000_0000 else e for e in supported())
    entries = guest_cpuid(old, 0, CpuidSetup(platform=PLATFORM))
    assert entry(entries, 0x4000_0100).eax == 0x4000_0101


def test_without_leaves_of_kvm_ours_is_the_first_free_block() -> None:
    bare = tuple(e for e in supported() if e.leaf >> 16 != 0x4000)
    entries = guest_cpuid(bare, 0, CpuidSetup(platform=PLATFORM))
    assert signature_of(entry(entries, 0x4000_0100)) == b"HyperBellVMM"
    assert 0x4000_0200 not in {e.leaf for e in entries}


def test_no_leaf_is_said_twice() -> None:
    entries = guest_cpuid(supported(), 1, CpuidSetup(vcpus=2, platform=PLATFORM))
    places = [(e.leaf, e.subleaf) for e in entries]
    assert len(set(places)) == len(places)
    assert {e.leaf for e in entries} >= {e.leaf for e in supported()} - {0x4000_0000}
