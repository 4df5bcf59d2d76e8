// SPDX-License-Identifier: GPL-2.0
/*
 * May this guest ring by hypercall? Decided from CPUID, never by trying: the CPUID of a guest is made by the
 * hypervisor directly beneath it, so a leaf of ours is that hypervisor's own word that it understands the call.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cc_platform.h>
#include <linux/cpumask.h>
#include <linux/kernel.h>
#include <linux/mutex.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include <linux/version.h>

#include <asm/cpufeature.h>
#include <asm/kvm_para.h>

#include "compat.h"
#include "hyperbell.h"

#define HB_LEAF_FIRST	0x40000000
#define HB_LEAF_END	0x40010000
#define HB_LEAF_STEP	0x100

#define HB_HYPERVISOR_PRESENT	BIT(31)	/* CPUID leaf 1, ECX */
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

/* May this guest ring by hypercall, with which key, and if not, why? */
struct hb_decision {
	bool available;
	u32 key;
	char reason[96];
};

static DEFINE_MUTEX(hb_decision_lock);	/* for those who read the reason; only the worker decides */
static struct hb_decision hb_decision;
static bool hb_id_is_ours;
static u32 hb_pv_bits_seen;

static bool hb_refuse(struct hb_decision *decision, const char *reason)
{
	strscpy(decision->reason, reason, sizeof(decision->reason));
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

static bool hb_platform_offers(struct hb_decision *decision)
{
	u32 highest, base, version, key, flags, unused;

	base = hb_leaf_find(HB_SIGNATURE, &highest);
	if (!base || highest < base + 1)
		return hb_refuse(decision, "the hypervisor directly beneath shows no " HB_SIGNATURE " leaf");
	cpuid(base + 1, &version, &key, &flags, &unused);
	if (version != HB_ABI_VERSION) {
		snprintf(decision->reason, sizeof(decision->reason),
			 "the platform speaks version %u of the doorbell, not %d", version, HB_ABI_VERSION);
		return false;
	}
	if (!(flags & HB_FLAG_OFFERED))
		return hb_refuse(decision, "the platform withholds the hypercall doorbell");
	if (!key || key > HB_BELL_MAX)
		return hb_refuse(decision, "the platform's key is not a number of 24 bits");
	decision->key = key;
	return true;
}

static bool hb_platform_has_hypercalls(struct hb_decision *decision)
{
	u32 highest;

	if (!hb_leaf_is(HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS, HB_HV_SIGNATURE, &highest) ||
	    highest < HYPERV_CPUID_FEATURES)
		return hb_refuse(decision, "the hypervisor directly beneath shows no Hyper-V leaves");
	if (cpuid_eax(HYPERV_CPUID_INTERFACE) != HB_HV_INTERFACE)
		return hb_refuse(decision, "the Hyper-V leaves do not name the interface Hv#1");
	if (!(cpuid_eax(HYPERV_CPUID_FEATURES) & HV_MSR_HYPERCALL_AVAILABLE))
		return hb_refuse(decision, "the Hyper-V leaves offer no hypercall MSRs");
	return true;
}

/*
 * What KVM's bits were stays true: a kernel that has made itself use these calls goes on with them where the guest is
 * resumed, whatever CPUID shows there.
 */
static void hb_platform_note_pv_bits(void)
{
	u32 highest, base = hb_leaf_find(HB_KVM_SIGNATURE, &highest);

	if (base)
		hb_pv_bits_seen |= cpuid_eax(base + 1) & HB_PV_BITS;
}

static bool hb_platform_is_safe(struct hb_decision *decision)
{
	/* There a hypercall is no exit to KVM: the guest's own #VC or #VE handler gets it. */
	if (cc_platform_has(CC_ATTR_GUEST_STATE_ENCRYPT) || cpu_feature_enabled(X86_FEATURE_TDX_GUEST))
		return hb_refuse(decision, "the guest's registers are encrypted (SEV-ES, SEV-SNP or TDX)");
	if (!hb_pv_bits_seen || num_possible_cpus() == 1)
		return true;
	snprintf(decision->reason, sizeof(decision->reason),
		 "%u CPUs and KVM's own hypercalls (feature bits 0x%x), which the call would break",
		 num_possible_cpus(), hb_pv_bits_seen);
	return false;
}

/* KVM takes Hyper-V's calls only from a guest that has said who it is; one that was resumed elsewhere says it again. */
static bool hb_platform_identify(struct hb_decision *decision)
{
	u64 id = 0;

	if (rdmsrq_safe(HV_X64_MSR_GUEST_OS_ID, &id))
		return hb_refuse(decision, "the MSR GUEST_OS_ID cannot be read");
	if (id)
		return true;
	if (wrmsrq_safe(HV_X64_MSR_GUEST_OS_ID, HB_GUEST_OS_ID))
		return hb_refuse(decision, "the MSR GUEST_OS_ID cannot be written");
	hb_id_is_ours = true;
	return true;
}

static void hb_platform_decide(struct hb_decision *decision)
{
	if (!(cpuid_ecx(1) & HB_HYPERVISOR_PRESENT)) {
		hb_refuse(decision, "CPUID shows no hypervisor");
		return;
	}
	hb_platform_note_pv_bits();
	decision->available = hb_platform_has_hypercalls(decision) && hb_platform_offers(decision) &&
			      hb_platform_is_safe(decision) && hb_platform_identify(decision);
	if (decision->available)
		strscpy(decision->reason, "available", sizeof(decision->reason));
	else
		decision->key = 0;
}

/*
 * hb_platform_look - decide anew; true: not as before, and ids made with the key until now hold no more
 *
 * At load, and before queues are armed: the guest may have been hibernated and resumed on a host with another key, or
 * none. A new decision is one line in the log.
 */
bool hb_platform_look(void)
{
	struct hb_decision now = {};

	hb_platform_decide(&now);
	if (now.key == hb_decision.key && !strcmp(now.reason, hb_decision.reason))
		return false;
	if (!now.available)
		pr_info("hypercall doorbell not available: %s\n", now.reason);
	else
		pr_info("hypercall doorbell available%s\n", hb_decision.available ? ", with another key" : "");
	mutex_lock(&hb_decision_lock);
	hb_decision = now;
	mutex_unlock(&hb_decision_lock);
	return true;
}

bool hb_platform_available(void)
{
	return READ_ONCE(hb_decision.available);
}

/*
 * hb_platform_describe - "available", or why not, for sysfs
 */
ssize_t hb_platform_describe(char *page)
{
	ssize_t length;

	mutex_lock(&hb_decision_lock);
	length = sysfs_emit(page, "%s\n", hb_decision.reason);
	mutex_unlock(&hb_decision_lock);
	return length;
}

u32 hb_platform_key(void)
{
	return hb_decision.key;
}

/*
 * hb_platform_withdraw - GUEST_OS_ID as it was found, once nobody rings any more
 *
 * Where the guest has been resumed on another host, there may be no such MSR, or somebody else's.
 */
void hb_platform_withdraw(void)
{
	u64 id = 0;

	if (!hb_id_is_ours)
		return;
	hb_id_is_ours = false;
	if (rdmsrq_safe(HV_X64_MSR_GUEST_OS_ID, &id) || id != HB_GUEST_OS_ID)
		return;
	if (wrmsrq_safe(HV_X64_MSR_GUEST_OS_ID, 0))
		pr_warn("the MSR GUEST_OS_ID could not be given back\n");
}
