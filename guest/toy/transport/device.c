/* How a driver finds, starts, resets and waits for a device, by the registers of virtio-mmio. */
#include "transport/device.h"

#include "start/interrupts.h"
#include "start/report.h"

#define MAGIC 0x74726976 /* "virt" */
#define VERSION 2
#define INTERRUPT_USED 1u
#define INTERRUPT_CONFIG 2u
#define INTERRUPT_ROUNDS 8
#define IDLE_WAKES_MAX 1000

static void device_interrupt(void *argument)
{
	struct device *device = argument;
	uint32_t round, status;

	/* More than once: an edge is all there is, and one that comes while the line is still up is lost. */
	for (round = 0; round < INTERRUPT_ROUNDS; round++) {
		status = device_read(device, DEVICE_INTERRUPT_STATUS);
		if (!status)
			break;
		if (status & INTERRUPT_CONFIG)
			device->config_changes++;
		device_write(device, DEVICE_INTERRUPT_ACK, status);
	}
	if (!round)
		device->interrupts_spurious++;
	else
		device->interrupts++;
}

static void device_set_name(struct device *device, uint32_t number)
{
	const char *from = device->driver->name;
	char *to = device->bus.name;

	while (*from)
		*to++ = *from++;
	if (number)
		*to++ = (char)('0' + number);
	*to = '\0';
}

int device_find(struct device *device, uint32_t slot, const struct device_option *option, const struct driver *driver)
{
	uint32_t value, number = 0, i;

	device->slot = slot;
	device->bus.base = option->base;
	device->gsi = option->gsi;
	device->bus.port = option->port;
	device->driver = driver;
	for (i = 0; i < slot; i++)
		number += options.devices[i].id == option->id;
	device_set_name(device, number);
	value = device_read(device, DEVICE_MAGIC);
	if (value != MAGIC)
		return report_error("%s: magic value 0x%x at 0x%x", device->bus.name, value, device->bus.base);
	value = device_read(device, DEVICE_VERSION);
	if (value != VERSION)
		return report_error("%s: version %u of the registers", device->bus.name, value);
	value = device_read(device, DEVICE_ID);
	if (value != option->id)
		return report_error("%s: the device says it is id %u", device->bus.name, value);
	return interrupts_attach(slot, device->gsi, device_interrupt, device);
}

bool device_has(const struct device *device, uint64_t feature)
{
	return device->bus.features & feature;
}

int device_reset(struct device *device)
{
	uint32_t since = interrupts_now();

	device->bus.broken = false;
	device->queue_count = 0;
	device->idle_wakes = 0;
	device_write(device, DEVICE_STATUS, 0);
	while (device_read(device, DEVICE_STATUS)) {
		if (!interrupts_patient(since))
			return report_error("%s: reset does not end, status 0x%x", device->bus.name,
					    device_read(device, DEVICE_STATUS));
	}
	return 0;
}

static uint64_t device_read_features(const struct device *device)
{
	uint64_t features;

	device_write(device, DEVICE_FEATURES_SEL, 1);
	features = (uint64_t)device_read(device, DEVICE_FEATURES) << 32;
	device_write(device, DEVICE_FEATURES_SEL, 0);
	return features | device_read(device, DEVICE_FEATURES);
}

int device_negotiate(struct device *device)
{
	uint64_t wanted = device->driver->features | FEATURE_VERSION_1;
	uint32_t status = STATUS_ACKNOWLEDGE;

	device_write(device, DEVICE_STATUS, status);
	status |= STATUS_DRIVER;
	device_write(device, DEVICE_STATUS, status);
	device->offered = device_read_features(device);
	if (!(device->offered & FEATURE_VERSION_1))
		return report_error("%s: VERSION_1 is not offered (features 0x%llx)", device->bus.name,
				    (unsigned long long)device->offered);
	if (options.event_idx)
		wanted |= FEATURE_EVENT_IDX;
	if (doorbell_may_be_fast())
		wanted |= FEATURE_HYPERCALL_NOTIFY;
	device->bus.features = device->offered & wanted;
	device_write(device, DEVICE_DRIVER_FEATURES_SEL, 0);
	device_write(device, DEVICE_DRIVER_FEATURES, (uint32_t)device->bus.features);
	device_write(device, DEVICE_DRIVER_FEATURES_SEL, 1);
	device_write(device, DEVICE_DRIVER_FEATURES, (uint32_t)(device->bus.features >> 32));
	status |= STATUS_FEATURES_OK;
	device_write(device, DEVICE_STATUS, status);
	if (!(device_read(device, DEVICE_STATUS) & STATUS_FEATURES_OK))
		return report_error("%s: FEATURES_OK is refused for 0x%llx of 0x%llx", device->bus.name,
				    (unsigned long long)device->bus.features, (unsigned long long)device->offered);
	return 0;
}

void device_write_address(const struct device *device, uint32_t offset, uint64_t gpa)
{
	device_write(device, offset, (uint32_t)gpa);
	device_write(device, offset + 4, (uint32_t)(gpa >> 32));
}

/* 4.2.3.2 */
static int device_begin_queue(struct device *device, uint32_t index)
{
	struct queue *queue = &device->queues[index];
	uint32_t size = QUEUE_SIZE_MAX, size_max;

	device_write(device, DEVICE_QUEUE_SEL, index);
	if (device_read(device, DEVICE_QUEUE_READY))
		return report_error("%s: queue %u is ready before it was set up", device->bus.name, index);
	size_max = device_read(device, DEVICE_QUEUE_SIZE_MAX);
	if (!size_max)
		return report_error("%s: there is no queue %u", device->bus.name, index);
	while (size > size_max)
		size /= 2;
	queue_empty(queue, &device->bus, index, size, device_has(device, FEATURE_EVENT_IDX));
	device_write(device, DEVICE_QUEUE_SIZE, size);
	device_write_address(device, DEVICE_QUEUE_DESCRIPTORS, (uintptr_t)queue->rings->descriptors);
	device_write_address(device, DEVICE_QUEUE_AVAILABLE, (uintptr_t)&queue->rings->available);
	device_write_address(device, DEVICE_QUEUE_USED, (uintptr_t)&queue->rings->used);
	device_write(device, DEVICE_QUEUE_READY, 1);
	if (device_read(device, DEVICE_QUEUE_READY) != 1)
		return report_error("%s: queue %u does not get ready", device->bus.name, index);
	return doorbell_choose(queue);
}

int device_begin(struct device *device)
{
	uint32_t index, count;

	if (device_reset(device) || device_negotiate(device))
		return -1;
	count = device->driver->queue_count(device);
	for (index = 0; index < count; index++) {
		if (device_begin_queue(device, index)) {
			device_write(device, DEVICE_STATUS, device_read(device, DEVICE_STATUS) | STATUS_FAILED);
			return -1;
		}
	}
	device->queue_count = count;
	device_write(device, DEVICE_STATUS, device_read(device, DEVICE_STATUS) | STATUS_DRIVER_OK);
	if (device->driver->begin && device->driver->begin(device))
		return -1;
	return 0;
}

int device_wait(struct device *device, uint32_t seen, const char *what)
{
	const char *hint = "the device is silent";
	uint32_t i;

	if (device->bus.broken)
		return -1; /* reported when it was seen */
	if (device->bus.answers != device->answers_seen) {
		device->answers_seen = device->bus.answers;
		device->idle_wakes = 0;
	}
	if (++device->idle_wakes > IDLE_WAKES_MAX)
		hint = "it interrupts, but gives nothing back";
	else if (interrupts_wait(&device->interrupts, seen))
		return 0;
	for (i = 0; i < device->queue_count; i++) {
		if (queue_has_used(&device->queues[i]))
			hint = "the used ring moved, but no interrupt came";
	}
	device->bus.broken = true;
	return report_error("%s: waiting for %s: %s; device status 0x%x", device->bus.name, what, hint,
			    device_read(device, DEVICE_STATUS));
}

int device_ask(struct device *device, struct queue *queue, const struct queue_buffer *buffers, uint32_t readable,
	       uint32_t writable, uint32_t *length)
{
	uint32_t seen = device->interrupts;

	if (!queue_add(queue, buffers, readable, writable, device))
		return report_error("%s: queue %u of %u entries is too small for a request", device->bus.name, queue->index,
				    queue->size);
	queue_publish(queue);
	while (!queue_take(queue, length)) {
		if (device_wait(device, seen, "one request"))
			return -1;
		seen = device->interrupts;
	}
	return 0;
}

void device_report_doorbells(const struct device *device)
{
	uint32_t hypercall = 0, plain = 0, refused = 0, suppressed = 0, rearmed = 0, i;

	for (i = 0; i < DEVICE_QUEUES; i++) {
		const struct doorbell *doorbell = &device->queues[i].doorbell;

		hypercall += doorbell->hypercall;
		plain += doorbell->plain;
		refused += doorbell->refused;
		suppressed += doorbell->suppressed;
		rearmed += doorbell->rearmed;
	}
	report("%s.hypercall=%u", device->bus.name, hypercall);
	report("%s.plain=%u", device->bus.name, plain);
	report("%s.refused=%u", device->bus.name, refused);
	report("%s.suppressed=%u", device->bus.name, suppressed);
	report("%s.rearmed=%u", device->bus.name, rearmed);
}

void device_report(const struct device *device)
{
	uint32_t i;

	report("%s.offered=0x%llx", device->bus.name, (unsigned long long)device->offered);
	report("%s.features=0x%llx", device->bus.name, (unsigned long long)device->bus.features);
	report("%s.queues=%u", device->bus.name, device->queue_count);
	report("%s.interrupts=%u", device->bus.name, device->interrupts);
	report("%s.spurious=%u", device->bus.name, device->interrupts_spurious);
	report("%s.config_changes=%u", device->bus.name, device->config_changes);
	report("%s.answers=%u", device->bus.name, device->bus.answers);
	device_report_doorbells(device);
	for (i = 0; i < device->queue_count; i++) {
		const struct doorbell *doorbell = &device->queues[i].doorbell;

		report("%s.queue%u.size=%u", device->bus.name, i, device->queues[i].size);
		report("%s.queue%u.hypercall=%u", device->bus.name, i, doorbell->hypercall);
		report("%s.queue%u.plain=%u", device->bus.name, i, doorbell->plain);
		report("%s.queue%u.refused=%u", device->bus.name, i, doorbell->refused);
		report("%s.queue%u.doorbell=%s", device->bus.name, i, doorbell->fast ? "hypercall" : "plain");
		if (!doorbell->fast)
			report("%s.queue%u.plain_reason=%s", device->bus.name, i, doorbell->plain_reason);
	}
}
