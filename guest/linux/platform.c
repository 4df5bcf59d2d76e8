// SPDX-License-Identifier: GPL-2.0
/*
 * May this guest ring by hypercall? Decided from CPUID, never by trying: the CPUID of a guest is made by the
 * hypervisor directly beneath it, so a leaf of ours is that hypervisor's own word that it understands the call.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cc_platform.h>
#include <linux/cpumask.h>
#include <linux/kernel.h>
#include <linux/string.h>
#include <linux/version.h>

#include <asm/cpufeature.h>
#include <asm/hyperv-tlfs.h>
#include <asm/kvm_para.h>
#include <asm/msr.h>
#include <asm/processor.h>

#include "hyperbell.h"

#define HB_LEAF_FIRST	0x40000000
#define HB_LEAF_END	0x40010000
#define HB_LEAF_STEP	0x100

#define HB_HV_SIGNATURE		"Microsoft Hv"
#define HB_HV_INTERFACE		0x31237648	/* "Hv#1" */
#define HB_KVM_SIGNATURE	"KVMKVMKVM\0\0\0"
#define HB_SIGNATURE		"HyperBellVMM"
#define HB_ABI_VERSION		1
#define HB_FLAG_OFFERED		BIT(0)

/*
 * Features by which Linux makes KVM's own hypercalls. Once GUEST_OS_ID is set, KVM hands every hypercall of the VM to
 * its Hyper-V code, and a lost wake-up or IPI hangs a guest with more than one CPU.
 */
#define HB_PV_BITS	(BIT(KVM_FEATURE_PV_UNHALT) | BIT(KVM_FEATURE_PV_SEND_IPI) | \
			 BIT(KVM_FEATURE_PV_SCHED_YIELD) | BIT(KVM_FEATURE_HC_MAP_GPA_RANGE))

/* An open-source OS (bit 63), Linux (1 in bits 62:56), and its version: the specification's layout. */
#define HB_GUEST_OS_ID	(BIT_ULL(63) | 1ULL << 56 | (u64)LINUX_VERSION_CODE << 16)

static bool hb_available;
static bool hb_id_is_ours;
static u32 hb_key;
static char hb_reason[96];

static bool hb_refuse(const char *reason)
{
	hb_available = false;
	strscpy(hb_reason, reason, sizeof(hb_reason));
	return false;
}

static bool hb_leaf_is(unsigned int leaf, const char *signature, u32 *highest)
{
	u32 words[3];

	cpuid(leaf, highest, &words[0], &words[1], &words[2]);
	return !memcmp(words, signature, sizeof(words));
}

/* The base of the block with this signature, or 0. */
static u32 hb_leaf_find(const char *signature, u32 *highest)
{
	u32 base;

	for (base = HB_LEAF_FIRST; base < HB_LEAF_END; base += HB_LEAF_STEP)
		if (hb_leaf_is(base, signature, highest))
			return base;
	return 0;
}

static bool hb_platform_offers(void)
{
	u32 highest, base, version, key, flags, unused;

	base = hb_leaf_find(HB_SIGNATURE, &highest);
	if (!base || highest < base + 1)
		return hb_refuse("the hypervisor directly beneath shows no " HB_SIGNATURE " leaf");
	cpuid(base + 1, &version, &key, &flags, &unused);
	if (version != HB_ABI_VERSION) {
		snprintf(hb_reason, sizeof(hb_reason), "the platform speaks version %u of the doorbell, not %d",
			 version, HB_ABI_VERSION);
		return false;
	}
	if (!(flags & HB_FLAG_OFFERED))
		return hb_refuse("the platform withholds the hypercall doorbell");
	if (!key || key > HB_BELL_MAX)
		return hb_refuse("the platform's key is not a number of 24 bits");
	hb_key = key;
	return true;
}

static bool hb_platform_has_hypercalls(void)
{
	u32 highest;

	if (!hb_leaf_is(HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS, HB_HV_SIGNATURE, &highest) ||
	    highest < HYPERV_CPUID_FEATURES)
		return hb_refuse("the hypervisor directly beneath shows no Hyper-V leaves");
	if (cpuid_eax(HYPERV_CPUID_INTERFACE) != HB_HV_INTERFACE)
		return hb_refuse("the Hyper-V leaves do not name the interface Hv#1");
	if (!(cpuid_eax(HYPERV_CPUID_FEATURES) & HV_MSR_HYPERCALL_AVAILABLE))
		return hb_refuse("the Hyper-V leaves offer no hypercall MSRs");
	return true;
}

static bool hb_platform_is_safe(void)
{
	u32 highest, base, features;

	/* There a hypercall is no exit to KVM: the guest's own #VC or #VE handler gets it. */
	if (cc_platform_has(CC_ATTR_GUEST_STATE_ENCRYPT) || cpu_feature_enabled(X86_FEATURE_TDX_GUEST))
		return hb_refuse("the guest's registers are encrypted (SEV-ES, SEV-SNP or TDX)");
	base = hb_leaf_find(HB_KVM_SIGNATURE, &highest);
	if (!base || num_possible_cpus() == 1)
		return true;
	features = cpuid_eax(base + 1);
	if (!(features & HB_PV_BITS))
		return true;
	snprintf(hb_reason, sizeof(hb_reason),
		 "%u CPUs and KVM's own hypercalls (feature bits 0x%lx), which the call would break",
		 num_possible_cpus(), features & HB_PV_BITS);
	return false;
}

/*
 * hb_platform_probe - decide once, at load
 *
 * The reason why not is one line in the log, and stays readable in sysfs.
 */
bool hb_platform_probe(void)
{
	if (!boot_cpu_has(X86_FEATURE_HYPERVISOR))
		hb_refuse("CPUID shows no hypervisor");
	else if (hb_platform_has_hypercalls() && hb_platform_offers() && hb_platform_is_safe())
		hb_available = hb_platform_identify();
	if (hb_available)
		pr_info("hypercall doorbell available\n");
	else
		pr_info("hypercall doorbell not available: %s\n", hb_reason);
	return hb_available;
}

bool hb_platform_available(void)
{
	return hb_available;
}

const char *hb_platform_reason(void)
{
	return hb_available ? "available" : hb_reason;
}

u32 hb_platform_key(void)
{
	return hb_key;
}

/*
 * hb_platform_identify - KVM takes Hyper-V's calls only from a guest that has said who it is
 *
 * Also before queues are armed again: the VM may have been resumed from a hibernation image since.
 */
bool hb_platform_identify(void)
{
	u64 id = 0;

	if (rdmsrl_safe(HV_X64_MSR_GUEST_OS_ID, &id))
		return hb_refuse("the MSR GUEST_OS_ID cannot be read");
	if (id)
		return true;
	if (wrmsrl_safe(HV_X64_MSR_GUEST_OS_ID, HB_GUEST_OS_ID))
		return hb_refuse("the MSR GUEST_OS_ID cannot be written");
	hb_id_is_ours = true;
	return true;
}

/*
 * hb_platform_withdraw - GUEST_OS_ID as it was found, once nobody rings any more
 */
void hb_platform_withdraw(void)
{
	if (hb_id_is_ours && wrmsrl_safe(HV_X64_MSR_GUEST_OS_ID, 0))
		pr_warn("the MSR GUEST_OS_ID could not be given back\n");
}
