/* virtio-rng (virtio 1.3, 5.4): random bytes that are not all the same, and not those of before. */
#include "drivers/drivers.h"
#include "start/memory.h"
#include "start/report.h"

#define SLOTS 4
#define SLOT_WORDS 16
#define SLOT_BYTES (SLOT_WORDS * 4)
#define BYTES_COMPARED 16 /* that many random ones do not repeat by chance */

struct slot {
	uint32_t words[SLOT_WORDS] __attribute__((aligned(64)));
	bool busy;
};

struct rng {
	struct slot slots[SLOTS];
	uint32_t previous[BYTES_COMPARED / 4];
	bool has_previous;
	uint32_t bytes;
};

static uint32_t rng_queue_count(const struct device *device)
{
	(void)device;
	return 1;
}

static int rng_begin(struct device *device)
{
	struct rng *rng;
	uint32_t i;

	if (!device->state)
		device->state = memory_take(sizeof(*rng), 64);
	rng = device->state;
	for (i = 0; i < SLOTS; i++)
		rng->slots[i].busy = false;
	return 0;
}

static bool rng_give(struct device *device)
{
	struct rng *rng = device->state;
	struct queue_buffer buffer;
	struct slot *slot;

	for (slot = rng->slots; slot < rng->slots + SLOTS; slot++) {
		if (slot->busy)
			continue;
		memset(slot->words, 0, SLOT_BYTES);
		buffer = (struct queue_buffer){ slot->words, SLOT_BYTES };
		slot->busy = queue_add(&device->queues[0], &buffer, 0, 1, slot);
		return slot->busy;
	}
	return false;
}

static int rng_check_slot(struct device *device, const struct slot *slot, uint32_t length)
{
	struct rng *rng = device->state;
	bool constant = true, repeated = rng->has_previous;
	uint32_t i;

	if (!length || length > SLOT_BYTES)
		return report_error("%s: %u bytes for a buffer of %u", device->bus.name, length, (uint32_t)SLOT_BYTES);
	rng->bytes += length;
	if (length < BYTES_COMPARED)
		return 0; /* allowed: "the device MAY" give less */
	for (i = 0; i < BYTES_COMPARED / 4; i++) {
		constant = constant && slot->words[i] == slot->words[0];
		repeated = repeated && slot->words[i] == rng->previous[i];
		rng->previous[i] = slot->words[i];
	}
	rng->has_previous = true;
	if (constant)
		return report_error("%s: all words are 0x%x", device->bus.name, slot->words[0]);
	if (repeated)
		return report_error("%s: the same bytes twice, beginning with 0x%x", device->bus.name, slot->words[0]);
	return 0;
}

static int rng_work(struct device *device, uint32_t requests)
{
	uint32_t given = 0, done = 0, before, seen, length;
	struct slot *slot;

	while (done < requests) {
		before = done;
		while (given < requests && rng_give(device))
			given++;
		seen = device->interrupts;
		queue_publish(&device->queues[0]);
		while ((slot = queue_take(&device->queues[0], &length))) {
			slot->busy = false;
			done++;
			if (rng_check_slot(device, slot, length))
				return -1;
		}
		if (done == before && device_wait(device, seen, "random bytes"))
			return -1;
	}
	return 0;
}

static int rng_check(struct device *device)
{
	return rng_work(device, options.requests);
}

static int rng_leave(struct device *device)
{
	while (rng_give(device))
		;
	queue_publish(&device->queues[0]);
	return 0;
}

static void rng_report(const struct device *device)
{
	report("%s.bytes=%u", device->bus.name, ((const struct rng *)device->state)->bytes);
}

const struct driver rng_driver = {
	.id = 4,
	.name = "rng",
	.queue_count = rng_queue_count,
	.begin = rng_begin,
	.check = rng_check,
	.work = rng_work,
	.leave = rng_leave,
	.report = rng_report,
};
