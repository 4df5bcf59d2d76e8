/*
 * The two keys of the hypercall doorbell: the platform's, a CPUID leaf of the hypervisor directly beneath, and the
 * device's, two registers. Both must be there and agree before the first hypercall is made: a hypervisor that does not
 * know ours, or a device that came from another level, is recognized without a try.
 *
 * Of the driver's rules, two need nothing here: the program runs on one processor and never uses KVM's own hypercalls,
 * so KVM's PV bits do not matter; and it has no handler for what SEV-ES and TDX make of a port write, so it ends there
 * before it gets this far.
 */
#include "transport/doorbell.h"

#include "start/cpu.h"
#include "start/options.h"
#include "start/report.h"
#include "transport/queue.h"

#define CPUID_HYPERVISOR_BIT (1u << 31) /* of leaf 1, ECX */
#define CPUID_HYPERVISOR 0x40000000u
#define CPUID_HYPERVISOR_STEP 0x100u
#define CPUID_HYPERVISOR_END 0x40010000u
#define HYPERV_INTERFACE 0x31237648u /* "Hv#1" */

#define PLATFORM_VERSION 1
#define PLATFORM_OFFERED 1u
#define KEY_BITS 0xffffffu

#define MSR_GUEST_OS_ID 0x40000000u
#define OUR_OS_ID 0x8f00000000010000ull /* top bit: open source; of a kind that nobody has taken */

#define SIGNAL_EVENT_FAST 0x1005du
#define NO_KVM_HYPERCALL 0x7fffffffu /* a KVM without Hyper-V reads the number here, and must not know it */

static const char *platform_missing = "the platform was not looked at"; /* NULL: the key is there */
static uint32_t platform_key;
#ifdef __x86_64__
static bool amd;

static bool leaf_is(const struct cpuid_leaf *leaf, const char text[12])
{
	const uint32_t words[3] = { leaf->ebx, leaf->ecx, leaf->edx };
	uint32_t i;

	for (i = 0; i < 12; i++) {
		if ((char)(words[i / 4] >> 8 * (i % 4)) != text[i])
			return false;
	}
	return true;
}

static uint32_t platform_leaf(void)
{
	struct cpuid_leaf leaf;
	uint32_t base;

	for (base = CPUID_HYPERVISOR; base < CPUID_HYPERVISOR_END; base += CPUID_HYPERVISOR_STEP) {
		leaf = cpuid_read(base);
		if (leaf_is(&leaf, "HyperBellVMM") && leaf.eax > base)
			return base;
	}
	return 0;
}

static bool processor_is_amd(void)
{
	struct cpuid_leaf leaf = cpuid_read(0);
	const struct cpuid_leaf vendor = { 0, leaf.ebx, leaf.edx, leaf.ecx }; /* the text is in EBX, EDX, ECX */

	return leaf_is(&vendor, "AuthenticAMD") || leaf_is(&vendor, "HygonGenuine");
}

/* KVM hands hypercalls to its Hyper-V code only when the guest has said who it is. */
static bool guest_os_id_set(void)
{
	uint64_t id;

	if (!msr_read(MSR_GUEST_OS_ID, &id))
		return false;
	return id || msr_write(MSR_GUEST_OS_ID, OUR_OS_ID);
}

/* NULL, or why there is no platform key. */
static const char *platform_look(void)
{
	struct cpuid_leaf leaf;
	uint32_t base;

	if (!(cpuid_read(1).ecx & CPUID_HYPERVISOR_BIT))
		return "no hypervisor";
	base = platform_leaf();
	if (!base)
		return "no platform leaf";
	leaf = cpuid_read(CPUID_HYPERVISOR);
	if (!leaf_is(&leaf, "Microsoft Hv"))
		return "no Hyper-V leaves";
	if (cpuid_read(CPUID_HYPERVISOR + 1).eax != HYPERV_INTERFACE)
		return "no interface Hv#1";
	leaf = cpuid_read(base + 1);
	if (leaf.eax != PLATFORM_VERSION)
		return "the platform leaf is of another ABI version";
	if (!(leaf.ecx & PLATFORM_OFFERED))
		return "the platform leaf does not offer it";
	if (!leaf.ebx || leaf.ebx & ~KEY_BITS)
		return "the platform leaf has no key";
	platform_key = leaf.ebx;
	amd = processor_is_amd();
	return guest_os_id_set() ? NULL : "GUEST_OS_ID cannot be set";
}

/* Hyper-V's SIGNAL_EVENT with its arguments in registers. Any status but 0: not rung. #UD leaves the status as it was. */
static bool hypercall_signal(uint32_t id)
{
	register uint64_t flags asm("r8") = 0;
	uint64_t status = NO_KVM_HYPERCALL, control = SIGNAL_EVENT_FAST, input = id;

	if (amd)
		asm volatile("1: vmmcall\n"
			     "2:\n\t" CPU_FIXUP(1b, 2b)
			     : "+a"(status), "+c"(control), "+d"(input), "+r"(flags)
			     :
			     : "r9", "r10", "r11", "memory", "cc");
	else
		asm volatile("1: vmcall\n"
			     "2:\n\t" CPU_FIXUP(1b, 2b)
			     : "+a"(status), "+c"(control), "+d"(input), "+r"(flags)
			     :
			     : "r9", "r10", "r11", "memory", "cc");
	return status == 0;
}
#else
static const char *platform_look(void)
{
	return "a 32-bit guest"; /* KVM takes the arguments from other registers there */
}

static bool hypercall_signal(uint32_t id)
{
	(void)id;
	return false;
}
#endif

void doorbell_find_platform(void)
{
	platform_missing = platform_look();
	report("platform=%s", platform_missing ? platform_missing : "HyperBellVMM");
	if (!platform_missing)
		report("platform_key=0x%x", platform_key);
}

bool doorbell_may_be_fast(void)
{
	return options.doorbell == DOORBELL_HYPERCALL || options.doorbell == DOORBELL_AUTO;
}

/* The device's key for one queue. NULL: it matches and is accepted, else why the plain doorbell stays. */
static const char *device_key_look(struct queue *queue)
{
	const struct bus *bus = queue->bus;
	uint32_t key, bell;

	if (!doorbell_may_be_fast())
		return "told to ring by a plain doorbell";
	if (platform_missing)
		return platform_missing;
	if (!(bus->features & FEATURE_HYPERCALL_NOTIFY))
		return "feature bit 44 is not negotiated";
	bus_write(bus, DEVICE_QUEUE_SEL, queue->index);
	key = bus_read(bus, DEVICE_HYPERCALL_KEY);
	bell = bus_read(bus, DEVICE_HYPERCALL_BELL);
	if (!key)
		return "the device withholds its key";
	if (key != platform_key)
		return "the device's key is not the platform's";
	if (!bell || bell & ~KEY_BITS)
		return "the device has no bell for the queue";
	bus_write(bus, DEVICE_HYPERCALL_BELL, 1);
	queue->doorbell.id = bell ^ key;
	return NULL;
}

static bool plain_is_pio(void)
{
	return options.doorbell == DOORBELL_PIO || (options.doorbell != DOORBELL_MMIO && options.plain == DOORBELL_PIO);
}

static void doorbell_arm(struct queue *queue)
{
	struct doorbell *doorbell = &queue->doorbell;

	doorbell->plain_reason = device_key_look(queue);
	doorbell->fast = !doorbell->plain_reason;
	doorbell->plain_since = 0;
}

int doorbell_choose(struct queue *queue)
{
	const struct bus *bus = queue->bus;

	doorbell_arm(queue);
	if (options.doorbell == DOORBELL_HYPERCALL && !queue->doorbell.fast)
		return report_error("%s: queue %u is to ring by hypercall, but cannot: %s", bus->name, queue->index,
				    queue->doorbell.plain_reason);
	if (plain_is_pio() && !bus->port)
		return report_error("%s: is to ring by PIO, but has no notify port", bus->name);
	return 0;
}

void doorbell_ring_mmio(const struct bus *bus, uint32_t number)
{
	bus_write(bus, DEVICE_QUEUE_NOTIFY, number);
}

void doorbell_ring_pio(const struct bus *bus, uint32_t number)
{
	port_write16((uint16_t)bus->port, (uint16_t)number);
}

void doorbell_ring(struct queue *queue)
{
	struct doorbell *doorbell = &queue->doorbell;

	/* Off the fast path not for ever: a withdrawal may be temporary. */
	if (!doorbell->fast && options.rearm && doorbell->plain_since >= options.rearm) {
		doorbell_arm(queue);
		doorbell->rearmed += doorbell->fast;
	}
	if (doorbell->fast) {
		if (hypercall_signal(doorbell->id)) {
			doorbell->hypercall++;
			return;
		}
		doorbell->refused++;
		doorbell->fast = false;
		doorbell->plain_since = 0;
		doorbell->plain_reason = "a hypercall was refused";
	}
	doorbell->plain++;
	doorbell->plain_since++;
	if (plain_is_pio())
		doorbell_ring_pio(queue->bus, queue->index);
	else
		doorbell_ring_mmio(queue->bus, queue->index);
}
