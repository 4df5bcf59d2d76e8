/* A virtio device behind memory-mapped registers (virtio 1.3, 4.2.2), and what all drivers do with one. */
#ifndef TOY_DEVICE_H
#define TOY_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "start/options.h"
#include "transport/bus.h"
#include "transport/queue.h"

#define DEVICE_QUEUES 4

#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define STATUS_NEEDS_RESET 64
#define STATUS_FAILED 128

#define FEATURE_EVENT_IDX (1ull << 29)
#define FEATURE_VERSION_1 (1ull << 32)

struct device;

/* What is special to one type of device. */
struct driver {
	uint32_t id;
	const char *name;
	uint64_t features; /* accepted when offered; VERSION_1 and the like come by themselves */
	uint32_t (*queue_count)(const struct device *device);
	int (*begin)(struct device *device); /* the device has just come up; may be NULL */
	int (*check)(struct device *device); /* all that the device promises */
	int (*work)(struct device *device, uint32_t requests); /* plain I/O, every byte checked */
	bool (*told_to_stop)(struct device *device); /* by the host, through the device; may be NULL */
	int (*leave)(struct device *device); /* requests are given and not waited for */
	void (*report)(const struct device *device);
};

struct device {
	const struct driver *driver;
	struct bus bus;
	uint32_t slot;
	uint32_t gsi;
	uint64_t offered;
	uint32_t queue_count;
	struct queue queues[DEVICE_QUEUES];
	void *state; /* the driver's */
	volatile uint32_t interrupts;
	volatile uint32_t interrupts_spurious; /* InterruptStatus was 0 */
	volatile uint32_t config_changes;
	uint32_t answers_seen;
	uint32_t idle_wakes;
};

static inline uint32_t device_read(const struct device *device, uint32_t offset)
{
	return bus_read(&device->bus, offset);
}

static inline void device_write(const struct device *device, uint32_t offset, uint32_t value)
{
	bus_write(&device->bus, offset, value);
}

/* Look who is there, and let its interrupts come. */
int device_find(struct device *device, uint32_t slot, const struct device_option *option, const struct driver *driver);

/* 3.1.1: from reset to DRIVER_OK. */
int device_begin(struct device *device);

/* Its parts, for those who leave the straight path. */
int device_reset(struct device *device);
int device_negotiate(struct device *device);
void device_write_address(const struct device *device, uint32_t offset, uint64_t gpa);
bool device_has(const struct device *device, uint64_t feature);

/* Halt until the device has interrupted once more than ``seen``. ``what`` completes "waiting for ...". */
int device_wait(struct device *device, uint32_t seen, const char *what);

/* Give the device one request on ``queue`` and wait for it. */
int device_ask(struct device *device, struct queue *queue, const struct queue_buffer *buffers, uint32_t readable,
	       uint32_t writable, uint32_t *length);

void device_report(const struct device *device);
void device_report_doorbells(const struct device *device);

#endif
