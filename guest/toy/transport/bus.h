/* What a queue and its doorbell know of their device: its registers (virtio 1.3, 4.2.2), its port, how it behaves. */
#ifndef TOY_BUS_H
#define TOY_BUS_H

#include <stdbool.h>
#include <stdint.h>

#include "start/cpu.h"

#define DEVICE_WINDOW 0x200

#define DEVICE_MAGIC 0x000
#define DEVICE_VERSION 0x004
#define DEVICE_ID 0x008
#define DEVICE_FEATURES 0x010
#define DEVICE_FEATURES_SEL 0x014
#define DEVICE_DRIVER_FEATURES 0x020
#define DEVICE_DRIVER_FEATURES_SEL 0x024
#define DEVICE_QUEUE_SEL 0x030
#define DEVICE_QUEUE_SIZE_MAX 0x034
#define DEVICE_QUEUE_SIZE 0x038
#define DEVICE_QUEUE_READY 0x044
#define DEVICE_QUEUE_NOTIFY 0x050
#define DEVICE_INTERRUPT_STATUS 0x060
#define DEVICE_INTERRUPT_ACK 0x064
#define DEVICE_STATUS 0x070
#define DEVICE_QUEUE_DESCRIPTORS 0x080 /* each of the three is low, high */
#define DEVICE_QUEUE_AVAILABLE 0x090
#define DEVICE_QUEUE_USED 0x0a0
#define DEVICE_HYPERCALL_KEY 0x0f0
#define DEVICE_HYPERCALL_BELL 0x0f4
#define DEVICE_CONFIG 0x100

struct bus {
	char name[8]; /* in messages */
	uint32_t base;
	uint32_t port; /* of the notify port; 0: none */
	uint64_t features; /* negotiated */
	bool broken; /* it did what it must not; nothing more is asked of it until it is reset */
	uint32_t answers; /* chains given back */
};

static inline uint32_t bus_read(const struct bus *bus, uint32_t offset)
{
	return mmio_read32(bus->base + offset);
}

static inline void bus_write(const struct bus *bus, uint32_t offset, uint32_t value)
{
	mmio_write32(bus->base + offset, value);
}

#endif
