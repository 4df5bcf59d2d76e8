/* The platform key: a leaf block added to a copy of what QEMU gives a vCPU, and KVM's PV bits that must be hidden. */
#include <stdlib.h>
#include <string.h>

#include "preload.h"

#define HYPERVISOR_LEAVES 0x40000000u
#define HYPERVISOR_LEAVES_END 0x40010000u
#define HYPERVISOR_BLOCK 0x100u

#define HYPERV_INTERFACE 0x31237648u	/* "Hv#1" */
#define KVM_SIGNATURE_EBX 0x4b4d564bu	/* "KVMKVMKVM" */
#define KVM_SIGNATURE_ECX 0x564b4d56u
#define KVM_SIGNATURE_EDX 0x4du

#define PLATFORM_SIGNATURE "HyperBellVMM"
#define PLATFORM_ABI 1u
#define PLATFORM_OFFERED 1u

/* Once the guest has set GUEST_OS_ID, KVM hands *every* hypercall to its Hyper-V code; a guest that uses KVM's own for
 * PV unhalt (7), IPIs (11), yielding (13) or mapping GPA ranges (16) would hang. */
#define HIDDEN_PV_BITS (1u << 7 | 1u << 11 | 1u << 13 | 1u << 16)

#define ENTRIES_MAX 4096u	/* far beyond what any KVM takes */
#define LEAF_FEATURES 1u
#define LEAF_AMD_FEATURES 0x80000001u
#define FEATURES_ECX_VMX (1u << 5)
#define AMD_FEATURES_ECX_SVM (1u << 2)

static const struct kvm_cpuid_entry2 *leaf(const struct kvm_cpuid2 *cpuid, uint32_t function)
{
	for (uint32_t i = 0; i < cpuid->nent; i++)
		if (cpuid->entries[i].function == function)
			return &cpuid->entries[i];
	return NULL;
}

bool cpuid_has_hyperv(const struct kvm_cpuid2 *cpuid)
{
	const struct kvm_cpuid_entry2 *interface = leaf(cpuid, HYPERVISOR_LEAVES + 1);

	return interface && interface->eax == HYPERV_INTERFACE;
}

/* Whether the guest is shown VMX or SVM: it can itself be a hypervisor. */
bool cpuid_may_nest(const struct kvm_cpuid2 *cpuid)
{
	const struct kvm_cpuid_entry2 *intel = leaf(cpuid, LEAF_FEATURES);
	const struct kvm_cpuid_entry2 *amd = leaf(cpuid, LEAF_AMD_FEATURES);

	return (intel && intel->ecx & FEATURES_ECX_VMX) || (amd && amd->ecx & AMD_FEATURES_ECX_SVM);
}

static bool block_is_free(const struct kvm_cpuid2 *cpuid, uint32_t base)
{
	for (uint32_t i = 0; i < cpuid->nent; i++)
		if (cpuid->entries[i].function - base < HYPERVISOR_BLOCK)
			return false;
	return true;
}

static void hide_pv_bits(struct kvm_cpuid2 *cpuid)
{
	for (uint32_t i = 0; i < cpuid->nent; i++) {
		const struct kvm_cpuid_entry2 *base = &cpuid->entries[i];

		if (base->function < HYPERVISOR_LEAVES || base->function >= HYPERVISOR_LEAVES_END ||
		    base->function % HYPERVISOR_BLOCK || base->ebx != KVM_SIGNATURE_EBX ||
		    base->ecx != KVM_SIGNATURE_ECX || base->edx != KVM_SIGNATURE_EDX)
			continue;
		for (uint32_t k = 0; k < cpuid->nent; k++)
			if (cpuid->entries[k].function == base->function + 1)
				cpuid->entries[k].eax &= ~HIDDEN_PV_BITS;
	}
}

/* A copy with the platform leaf and without the PV bits, to be freed; NULL: there is no room for it. */
struct kvm_cpuid2 *cpuid_with_key(const struct kvm_cpuid2 *cpuid, uint32_t key)
{
	struct kvm_cpuid2 *copy;
	uint32_t base = HYPERVISOR_LEAVES;
	struct kvm_cpuid_entry2 *added;

	if (cpuid->nent > ENTRIES_MAX)
		return NULL;
	while (base < HYPERVISOR_LEAVES_END && !block_is_free(cpuid, base))
		base += HYPERVISOR_BLOCK;
	if (base >= HYPERVISOR_LEAVES_END)
		return NULL;
	copy = calloc(1, sizeof(*copy) + (cpuid->nent + 2) * sizeof(copy->entries[0]));
	if (!copy)
		return NULL;
	memcpy(copy, cpuid, sizeof(*cpuid) + cpuid->nent * sizeof(cpuid->entries[0]));
	added = &copy->entries[cpuid->nent];
	added[0] = (struct kvm_cpuid_entry2){ .function = base, .eax = base + 1 };
	memcpy(&added[0].ebx, PLATFORM_SIGNATURE, 4);
	memcpy(&added[0].ecx, PLATFORM_SIGNATURE + 4, 4);
	memcpy(&added[0].edx, PLATFORM_SIGNATURE + 8, 4);
	added[1] = (struct kvm_cpuid_entry2){
		.function = base + 1, .eax = PLATFORM_ABI, .ebx = key, .ecx = PLATFORM_OFFERED,
	};
	copy->nent = cpuid->nent + 2;
	hide_pv_bits(copy);
	return copy;
}
