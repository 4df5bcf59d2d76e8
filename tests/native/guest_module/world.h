/*
 * The module's sources, and what is around them: a platform, a disk of our own virtio-mmio and one on PCI, a worker, and
 * a clock that a test lets pass. Included once, by the program that plays the scenarios.
 */
#ifndef WORLD_H
#define WORLD_H

#include <stdarg.h>

#include "own_kernel.h"

#include "platform.c"
#include "queue.c"
#include "scan.c"

#include "../check.h"

enum { SECOND = 1000, MINUTE = 60 * SECOND };

/* The platform as it is now. */
static struct {
	bool hypervisor, hyperv, interface, msrs, leaf, offered, encrypted, has_id, id_fixed;
	u32 version, key, pv_bits;
	unsigned int cpus;
	u64 id;
} platform;

static char last_log[160];
static int logs, scans;

/* A device and what is behind it. With a port it is virtio-pci; `withheld` is the device's own policy. */
struct place {
	struct device parent;
	struct virtio_device vdev;
	struct virtqueue vqs[2];
	struct resource memory;
	u32 bell, port, selected;
	u8 status;
	bool withheld;
	char registers[HB_MMIO_SIZE];
};

static struct place places[2];
static struct place *const disk = &places[0], *const other = &places[1];

unsigned long jiffies = 0UL - 5 * MINUTE;
struct bus_type platform_bus_type, pci_bus_type;

void kernel_log(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(last_log, sizeof(last_log), format, arguments);
	va_end(arguments);
	logs++;
}

static void signature(const char *text, u32 *ebx, u32 *ecx, u32 *edx)
{
	memcpy(ebx, text, 4);
	memcpy(ecx, text + 4, 4);
	memcpy(edx, text + 8, 4);
}

void cpuid(u32 leaf, u32 *eax, u32 *ebx, u32 *ecx, u32 *edx)
{
	*eax = *ebx = *ecx = *edx = 0;
	if (leaf == 1)
		*ecx = platform.hypervisor ? 1U << 31 : 0;
	if (platform.hyperv && leaf == 0x40000000) {
		*eax = 0x40000005;
		signature("Microsoft Hv", ebx, ecx, edx);
	} else if (platform.hyperv && leaf == 0x40000001) {
		*eax = platform.interface ? 0x31237648 : 0;
	} else if (platform.hyperv && leaf == 0x40000003) {
		*eax = platform.msrs ? 1U << 5 : 0;
	} else if (leaf == 0x40000100) {
		*eax = leaf + 1;
		signature("KVMKVMKVM\0\0\0", ebx, ecx, edx);
	} else if (leaf == 0x40000101) {
		*eax = platform.pv_bits | 1; /* a clock, which is no hypercall */
	} else if (platform.leaf && leaf == 0x40000200) {
		*eax = leaf + 1;
		signature("HyperBellVMM", ebx, ecx, edx);
	} else if (platform.leaf && leaf == 0x40000201) {
		*eax = platform.version;
		*ebx = platform.key;
		*ecx = platform.offered;
	}
}

unsigned int num_possible_cpus(void)
{
	return platform.cpus;
}

bool cc_platform_has(int attribute)
{
	return attribute == CC_ATTR_GUEST_STATE_ENCRYPT && platform.encrypted;
}

bool cpu_feature_enabled(int feature)
{
	(void)feature;
	return false;
}

int rdmsr_safe_function(u32 msr, u64 *value)
{
	CHECK(msr == HV_X64_MSR_GUEST_OS_ID);
	*value = platform.id;
	return platform.has_id ? 0 : -1;
}

int wrmsr_safe_function(u32 msr, u64 value)
{
	CHECK(msr == HV_X64_MSR_GUEST_OS_ID);
	if (!platform.has_id || platform.id_fixed)
		return -1;
	platform.id = value;
	return 0;
}

static bool shows_key(const struct place *place)
{
	return platform.leaf && !place->withheld;
}

static struct place *place_at(const void *address, unsigned long *offset)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(places); i++) {
		*offset = (unsigned long)address - (unsigned long)places[i].registers;
		if (*offset < HB_MMIO_SIZE)
			return &places[i];
	}
	abort();
}

u32 readl(const void *address)
{
	unsigned long offset;
	struct place *place = place_at(address, &offset);

	switch (offset) {
	case VIRTIO_MMIO_MAGIC_VALUE: return 0x74726976;
	case VIRTIO_MMIO_VERSION: return 2;
	case HB_MMIO_KEY: return shows_key(place) ? platform.key : 0;
	case HB_MMIO_BELL: return shows_key(place) ? place->bell + place->selected : 0;
	}
	abort();
}

void writel(u32 value, void *address)
{
	unsigned long offset;
	struct place *place = place_at(address, &offset);

	if (offset == VIRTIO_MMIO_QUEUE_SEL)
		place->selected = value;
	else
		CHECK(offset == HB_MMIO_BELL && value == 1);
}

struct resource *platform_get_resource(struct device *device, int type, int number)
{
	CHECK(type == IORESOURCE_MEM && number == 0);
	return &container_of(device, struct place, parent)->memory;
}

static u8 get_status(struct virtio_device *vdev)
{
	return container_of(vdev, struct place, vdev)->status;
}

static const struct virtio_config_ops config = { get_status };

int device_for_each_child(struct device *parent, void *data, int (*each)(struct device *, void *))
{
	return each(&container_of(parent, struct place, parent)->vdev.dev, data);
}

int hb_transports_walk(int (*each)(struct device *parent, void *data), void *data)
{
	scans++;
	for (unsigned int i = 0; i < ARRAY_SIZE(places); i++)
		if (each(&places[i].parent, data))
			return 1;
	return 0;
}

static void make_place(struct place *place, const char *name, u32 bell, u32 port)
{
	*place = (struct place){ .bell = bell, .port = port, .status = VIRTIO_CONFIG_S_DRIVER_OK };
	place->memory = (struct resource){ (unsigned long)place->registers, HB_MMIO_SIZE };
	place->parent = (struct device){ .bus = port ? &pci_bus_type : &platform_bus_type, .driver = place };
	place->vdev.dev = (struct device){ .name = name, .parent = &place->parent, .driver = place };
	place->vdev.config = &config;
	place->vdev.vqs = place->vqs;
	for (unsigned int i = 0; i < 2; i++)
		place->vqs[i] = (struct virtqueue){
			.next = i ? NULL : &place->vqs[1], .vdev = &place->vdev, .index = i,
			.priv = port ? (void *)(0x10000UL + port) : place->registers,
		};
}

/* A disk of our own virtio-mmio and one on PCI with a port, on a platform that offers. */
static void begin(void)
{
	platform = (__typeof__(platform)){ .hypervisor = true, .hyperv = true, .interface = true, .msrs = true,
		.leaf = true, .offered = true, .version = 1, .key = 0x5a17c3, .cpus = 2, .has_id = true };
	make_place(disk, "virtio1", 0x40, 0);
	make_place(other, "virtio2", 0, 0xc040);
}

/* As hb_init() does. */
static void load(void)
{
	hb_platform_look();
	hb_scan_now(false);
}

/* Time goes by, and the worker runs whenever it is due. */
static void pass(unsigned long ms)
{
	unsigned long end = jiffies + ms;
	int turns = 0;

	while (hb_scan_worker.delay <= end - jiffies) {
		CHECK(turns++ < 10000); /* it spins */
		jiffies += hb_scan_worker.delay;
		kernel_run(&hb_scan_worker);
	}
	if (hb_scan_worker.delay != MAX_JIFFY_OFFSET)
		hb_scan_worker.delay -= end - jiffies;
	jiffies = end;
}

static struct hb_queue *queue_of(struct place *place)
{
	struct hb_queue *queue = hb_queue_find(&place->vqs[1]);

	CHECK(queue);
	return queue;
}

static int state_of(struct place *place)
{
	return atomic_read(&queue_of(place)->state);
}

static u32 bell_of(const struct place *place)
{
	return place->port ? place->port << 8 | 1 : place->bell + 1;
}

/* A kick of the device's second queue, as hb_kick() rings: true if by hypercall. The host withholds as the device does. */
static bool ring(struct place *place)
{
	struct hb_queue *queue = queue_of(place);

	if (atomic_read(&queue->state) != HB_ARMED)
		return false;
	if (shows_key(place) && queue->id == (bell_of(place) ^ platform.key)) {
		queue->hypercall.value++;
		return true;
	}
	queue->refused.value++;
	atomic_set(&queue->state, HB_REFUSED);
	hb_scan_soon();
	return false;
}

/* The device is reset and set up anew. */
static void set_up_anew(struct place *place)
{
	hb_queues_forget(&place->vdev);
	hb_scan_soon();
	pass(0);
}

#endif
