/* The misbehaviour that modes nonsense, flood and outside ask for. */
#include "hostile.h"

#include "start/interrupts.h"
#include "start/report.h"

#define FLOOD_RINGS 500
#define FIRST_QUEUE_OF_NONE 64 /* no device of this program has so many */
#define RAM_END 0xc0000000u    /* our own machine has no memory from here on, and QEMU's small one neither */

static uint32_t nonsense_state = 12345;

/*
 * The top bit is always set: nonsense in the high half of a ring's address never points at memory, so that nothing of
 * this program can be overwritten by a device that takes it seriously.
 */
static uint32_t nonsense(void)
{
	nonsense_state = nonsense_state * 1103515245u + 12345u;
	return nonsense_state | 0x80000000u;
}

int hostile_nonsense(struct device *device)
{
	uint32_t offset, accesses = 0, sum = 0;
	uintptr_t at;

	for (offset = 0; offset < DEVICE_WINDOW; offset++) {
		at = device->bus.base + offset;
		mmio_write8(at, (uint8_t)nonsense());
		sum += mmio_read8(at);
		accesses += 2;
		if (offset + 2 <= DEVICE_WINDOW) {
			mmio_write16(at, (uint16_t)nonsense());
			sum += mmio_read16(at);
			accesses += 2;
		}
		if (offset + 4 <= DEVICE_WINDOW) {
			mmio_write32(at, nonsense());
			sum += mmio_read32(at);
			accesses += 2;
		}
#ifdef __x86_64__
		if (offset + 8 <= DEVICE_WINDOW) {
			mmio_write64(at, (uint64_t)nonsense() << 32 | nonsense());
			sum += (uint32_t)mmio_read64(at);
			accesses += 2;
		}
#endif
	}
	report("nonsense.accesses=%u", accesses);
	report("nonsense.sum=0x%x", sum); /* says nothing, but the reads are for something */
	return device_reset(device);
}

int hostile_flood(struct device *device)
{
	uint32_t i, pio = 0;

	for (i = 0; i < FLOOD_RINGS; i++) {
		doorbell_ring_mmio(&device->bus, i & 1 ? FIRST_QUEUE_OF_NONE + i : nonsense());
		if (device->bus.port) {
			doorbell_ring_pio(&device->bus, FIRST_QUEUE_OF_NONE + i);
			pio++;
		}
	}
	report("flood.mmio=%u", i);
	report("flood.pio=%u", pio);
	return 0;
}

struct bad_rings {
	const char *name;
	uint32_t size; /* 0xffffffff: twice what the device allows; else what is written */
	uint64_t descriptors;
	uint64_t available;
	uint64_t used;
};

#define GOOD 0 /* the queue's own rings are taken */
#define SIZE_GOOD QUEUE_SIZE_MAX
#define SIZE_TWICE 0xffffffffu
#define ODD 1 /* added to the good address */

static const struct bad_rings bad_rings[] = {
	{ "descriptors_outside", SIZE_GOOD, RAM_END, GOOD, GOOD },
	{ "available_outside", SIZE_GOOD, GOOD, RAM_END, GOOD },
	{ "used_outside", SIZE_GOOD, GOOD, GOOD, RAM_END },
	{ "descriptors_far_outside", SIZE_GOOD, 0x00ffffff00000000ull, GOOD, GOOD },
	{ "descriptors_wrap", SIZE_GOOD, 0xfffffffffffffff0ull, GOOD, GOOD },
	{ "used_wraps", SIZE_GOOD, GOOD, GOOD, 0xfffffffffffffffcull },
	{ "descriptors_misaligned", SIZE_GOOD, ODD, GOOD, GOOD },
	{ "available_misaligned", SIZE_GOOD, GOOD, ODD, GOOD },
	{ "used_misaligned", SIZE_GOOD, GOOD, GOOD, ODD },
	{ "size_zero", 0, GOOD, GOOD, GOOD },
	{ "size_no_power_of_two", 3, GOOD, GOOD, GOOD },
	{ "size_too_large", SIZE_TWICE, GOOD, GOOD, GOOD },
};

static uint64_t bad_address(uint64_t bad, volatile void *good)
{
	return bad > ODD ? bad : (uintptr_t)good + bad;
}

/* What became of it: "not_ready", "needs_reset" or "accepted". NULL: the device cannot even be asked. */
static const char *outside_try(struct device *device, const struct bad_rings *bad)
{
	struct queue *queue = &device->queues[0];
	uint32_t status, since, size = bad->size;

	if (device_reset(device) || device_negotiate(device))
		return NULL;
	queue_empty(queue, &device->bus, 0, QUEUE_SIZE_MAX, false);
	device_write(device, DEVICE_QUEUE_SEL, 0);
	if (size == SIZE_TWICE)
		size = 2 * device_read(device, DEVICE_QUEUE_SIZE_MAX);
	device_write(device, DEVICE_QUEUE_SIZE, size);
	device_write_address(device, DEVICE_QUEUE_DESCRIPTORS,
			     bad_address(bad->descriptors, queue->rings->descriptors));
	device_write_address(device, DEVICE_QUEUE_AVAILABLE, bad_address(bad->available, &queue->rings->available));
	device_write_address(device, DEVICE_QUEUE_USED, bad_address(bad->used, &queue->rings->used));
	device_write(device, DEVICE_QUEUE_READY, 1);
	device_write(device, DEVICE_STATUS, device_read(device, DEVICE_STATUS) | STATUS_DRIVER_OK);
	doorbell_ring_mmio(&device->bus, 0);
	/* It may take its time to look; a queue that is not ready by then was refused. */
	since = interrupts_now();
	do {
		status = device_read(device, DEVICE_STATUS);
		if (status & STATUS_NEEDS_RESET)
			return "needs_reset";
		device_write(device, DEVICE_QUEUE_SEL, 0);
		if (!device_read(device, DEVICE_QUEUE_READY))
			return "not_ready";
		interrupts_pause(1);
	} while (interrupts_now() - since < 10);
	return "accepted";
}

int hostile_outside(struct device *device)
{
	const struct bad_rings *bad;
	const char *outcome;
	uint32_t i;

	for (i = 0; i < sizeof(bad_rings) / sizeof(bad_rings[0]); i++) {
		bad = &bad_rings[i];
		outcome = outside_try(device, bad);
		if (!outcome)
			return -1;
		report("outside.%s=%s", bad->name, outcome);
		if (*outcome == 'a' && !options.lenient)
			report_error("%s: rings accepted with %s", device->bus.name, bad->name);
	}
	return device_reset(device);
}
