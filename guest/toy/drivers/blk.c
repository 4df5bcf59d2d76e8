/* virtio-blk (virtio 1.3, 5.2). */
#include "drivers/drivers.h"
#include "drivers/pattern.h"
#include "start/memory.h"
#include "start/report.h"

#define FEATURE_RO (1ull << 5)
#define FEATURE_FLUSH (1ull << 9)
#define FEATURE_MQ (1ull << 12)

#define CONFIG_CAPACITY (DEVICE_CONFIG + 0)
#define CONFIG_NUM_QUEUES (DEVICE_CONFIG + 34)

#define REQUEST_IN 0
#define REQUEST_OUT 1
#define REQUEST_FLUSH 4
#define REQUEST_GET_ID 8
#define REQUEST_UNKNOWN 0x7a7a

#define STATUS_OK 0
#define STATUS_IOERR 1
#define STATUS_UNSUPP 2
#define STATUS_UNTOUCHED 0xee

#define SLOTS 8
#define SLOT_SECTORS 2
#define SLOT_BYTES (SLOT_SECTORS * SECTOR_BYTES)
#define DESCRIPTORS 3 /* a request has a header, data and a status byte */
#define ID_BYTES 20
#define POISON 0xa5
#define STOP 0x504f5453u /* "STOP" */

struct request_header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

struct slot {
	struct request_header header;
	uint8_t status;
	bool busy;
	uint64_t data[SLOT_BYTES / 8] __attribute__((aligned(64)));
};

struct blk {
	struct slot slots[SLOTS];
	uint64_t capacity;
	uint32_t next; /* of the requests that blk_work makes */
	uint32_t bytes_written;
	uint32_t bytes_checked;
};

static uint32_t blk_queue_count(const struct device *device)
{
	uint32_t count = device_has(device, FEATURE_MQ) ? mmio_read16(device->bus.base + CONFIG_NUM_QUEUES) : 1;

	return count > DEVICE_QUEUES ? DEVICE_QUEUES : count;
}

static int blk_begin(struct device *device)
{
	struct blk *blk;
	uint32_t i;

	if (!device->state)
		device->state = memory_take(sizeof(*blk), 64);
	blk = device->state;
	for (i = 0; i < SLOTS; i++)
		blk->slots[i].busy = false; /* a reset may have left requests behind */
	blk->capacity = device_read(device, CONFIG_CAPACITY);
	blk->capacity |= (uint64_t)device_read(device, CONFIG_CAPACITY + 4) << 32;
	if (blk->capacity < 2 * SLOT_SECTORS)
		return report_error("%s: capacity of 0x%llx sectors", device->bus.name, (unsigned long long)blk->capacity);
	return 0;
}

static void slot_fill(struct slot *slot, uint32_t type, uint64_t sector)
{
	slot->header.type = type;
	slot->header.reserved = 0;
	slot->header.sector = sector;
	slot->status = STATUS_UNTOUCHED;
}

/* Where the n-th request of a run goes: round and round on a small disk. The last sector is the host's. */
static uint64_t blk_sector(const struct blk *blk, uint32_t n)
{
	uint32_t sectors = blk->capacity >> 32 ? 0xffffffffu : (uint32_t)blk->capacity;

	return (uint64_t)(n % (sectors / SLOT_SECTORS - 1)) * SLOT_SECTORS;
}

static struct slot *blk_free_slot(struct blk *blk)
{
	uint32_t i;

	for (i = 0; i < SLOTS; i++) {
		if (!blk->slots[i].busy)
			return &blk->slots[i];
	}
	return NULL;
}

/* Give one request without waiting; false: no slot or no descriptors are free. */
static bool blk_give(struct device *device, uint32_t type, uint32_t n)
{
	struct blk *blk = device->state;
	struct queue *queue = &device->queues[n % device->queue_count];
	struct slot *slot = blk_free_slot(blk);
	struct queue_buffer buffers[DESCRIPTORS];

	if (!slot || queue->free_count < DESCRIPTORS)
		return false;
	slot_fill(slot, type, blk_sector(blk, n));
	if (type == REQUEST_OUT)
		pattern_fill(slot->data, SLOT_SECTORS, slot->header.sector, options.seed);
	else
		memset(slot->data, POISON, SLOT_BYTES);
	buffers[0] = (struct queue_buffer){ &slot->header, sizeof(slot->header) };
	buffers[1] = (struct queue_buffer){ slot->data, SLOT_BYTES };
	buffers[2] = (struct queue_buffer){ &slot->status, 1 };
	slot->busy = queue_add(queue, buffers, type == REQUEST_OUT ? 2 : 1, type == REQUEST_OUT ? 1 : 2, slot);
	return slot->busy;
}

static int blk_check_slot(struct device *device, const struct slot *slot, uint32_t length)
{
	struct blk *blk = device->state;
	bool out = slot->header.type == REQUEST_OUT;
	int32_t wrong;

	if (slot->status != STATUS_OK)
		return report_error("%s: %s of sector 0x%llx has status %u", device->bus.name, out ? "write" : "read",
				    (unsigned long long)slot->header.sector, slot->status);
	if (length != (out ? 1 : SLOT_BYTES + 1))
		return report_error("%s: %s of sector 0x%llx: the used ring says %u bytes", device->bus.name,
				    out ? "write" : "read", (unsigned long long)slot->header.sector, length);
	if (out) {
		blk->bytes_written += SLOT_BYTES;
		return 0;
	}
	wrong = pattern_compare(slot->data, SLOT_SECTORS, slot->header.sector, options.seed);
	if (wrong >= 0)
		return report_error("%s: byte %u of sector 0x%llx on is not what was written", device->bus.name,
				    (uint32_t)wrong, (unsigned long long)slot->header.sector);
	blk->bytes_checked += SLOT_BYTES;
	return 0;
}

/* So many requests, several in flight, over all queues. */
static int blk_run(struct device *device, uint32_t type, uint32_t first, uint32_t count)
{
	uint32_t given = 0, done = 0, before, seen, length, i;
	struct slot *slot;

	while (done < count) {
		before = done;
		while (given < count && blk_give(device, type, first + given))
			given++;
		seen = device->interrupts;
		for (i = 0; i < device->queue_count; i++)
			queue_publish(&device->queues[i]);
		for (i = 0; i < device->queue_count; i++) {
			while ((slot = queue_take(&device->queues[i], &length))) {
				slot->busy = false;
				done++;
				if (blk_check_slot(device, slot, length))
					return -1;
			}
		}
		if (done == before && device_wait(device, seen, type == REQUEST_OUT ? "writes" : "reads"))
			return -1;
	}
	return 0;
}

/* One request by itself; its status, or -1. ``bytes`` is what the device may write to the slot's data. */
static int blk_ask(struct device *device, uint32_t type, uint64_t sector, uint32_t bytes)
{
	struct blk *blk = device->state;
	struct slot *slot = &blk->slots[0];
	struct queue_buffer buffers[DESCRIPTORS];
	uint32_t count = 0, readable, length;

	slot_fill(slot, type, sector);
	buffers[count++] = (struct queue_buffer){ &slot->header, sizeof(slot->header) };
	if (bytes)
		buffers[count++] = (struct queue_buffer){ slot->data, bytes };
	buffers[count++] = (struct queue_buffer){ &slot->status, 1 };
	readable = type == REQUEST_OUT ? 2 : 1;
	if (device_ask(device, &device->queues[0], buffers, readable, count - readable, &length))
		return -1;
	return slot->status;
}

static int blk_expect(struct device *device, const char *what, int status, int expected)
{
	if (status == expected || status < 0)
		return status < 0 ? -1 : 0;
	return report_error("%s: %s has status %u, not %u", device->bus.name, what, (uint32_t)status, (uint32_t)expected);
}

static int blk_check_id(struct device *device)
{
	struct blk *blk = device->state;
	char *id = (char *)blk->slots[0].data;

	memset(id, 0, ID_BYTES + 1);
	if (blk_expect(device, "GET_ID", blk_ask(device, REQUEST_GET_ID, 0, ID_BYTES), STATUS_OK))
		return -1;
	report("%s.id=%s", device->bus.name, id);
	return 0;
}

static int blk_flush(struct device *device)
{
	if (!device_has(device, FEATURE_FLUSH))
		return 0;
	return blk_expect(device, "flush", blk_ask(device, REQUEST_FLUSH, 0, 0), STATUS_OK);
}

static int blk_work(struct device *device, uint32_t requests)
{
	struct blk *blk = device->state;
	uint32_t first = blk->next;

	if (device_has(device, FEATURE_RO))
		return blk_run(device, REQUEST_IN, 0, requests);
	blk->next += requests;
	if (blk_run(device, REQUEST_OUT, first, requests) || blk_flush(device))
		return -1;
	return blk_run(device, REQUEST_IN, first, requests);
}

static int blk_check(struct device *device)
{
	struct blk *blk = device->state;
	bool read_only = device_has(device, FEATURE_RO);

	report("%s.capacity=0x%llx", device->bus.name, (unsigned long long)blk->capacity);
	report("%s.read_only=%u", device->bus.name, read_only);
	if (read_only) {
		if (blk_expect(device, "write to a read-only disk", blk_ask(device, REQUEST_OUT, 0, SLOT_BYTES),
			       STATUS_IOERR))
			return -1;
	} else if (blk_run(device, REQUEST_OUT, 0, options.requests) || blk_flush(device)) {
		return -1;
	}
	if (blk_run(device, REQUEST_IN, 0, options.requests) || blk_check_id(device))
		return -1;
	if (blk_expect(device, "read behind the end", blk_ask(device, REQUEST_IN, blk->capacity, SLOT_BYTES),
		       STATUS_IOERR) ||
	    blk_expect(device, "read over the end", blk_ask(device, REQUEST_IN, blk->capacity - 1, SLOT_BYTES),
		       STATUS_IOERR) ||
	    blk_expect(device, "a request of no known type", blk_ask(device, REQUEST_UNKNOWN, 0, SLOT_BYTES),
		       STATUS_UNSUPP))
		return -1;
	/* None of these may have hurt the queue. */
	return blk_run(device, REQUEST_IN, 0, 1);
}

/* The host asks for the end of mode=loop by "STOP" in the last sector. */
static bool blk_told_to_stop(struct device *device)
{
	struct blk *blk = device->state;

	if (blk_ask(device, REQUEST_IN, blk->capacity - 1, SECTOR_BYTES) != STATUS_OK)
		return report_error("%s: the last sector cannot be read", device->bus.name);
	return (uint32_t)blk->slots[0].data[0] == STOP;
}

static int blk_leave(struct device *device)
{
	uint32_t n;

	for (n = 0; blk_give(device, REQUEST_IN, n); n++)
		;
	for (n = 0; n < device->queue_count; n++)
		queue_publish(&device->queues[n]);
	return 0;
}

static void blk_report(const struct device *device)
{
	const struct blk *blk = device->state;

	report("%s.bytes_written=%u", device->bus.name, blk->bytes_written);
	report("%s.bytes_checked=%u", device->bus.name, blk->bytes_checked);
}

const struct driver blk_driver = {
	.id = 2,
	.name = "blk",
	.features = FEATURE_RO | FEATURE_FLUSH | FEATURE_MQ,
	.queue_count = blk_queue_count,
	.begin = blk_begin,
	.check = blk_check,
	.work = blk_work,
	.told_to_stop = blk_told_to_stop,
	.leave = blk_leave,
	.report = blk_report,
};
