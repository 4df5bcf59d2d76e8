/* Doorbells: which one rings a queue, by the driver's rules of ABI version 1, and how often each was used. */
#ifndef TOY_DOORBELL_H
#define TOY_DOORBELL_H

#include <stdbool.h>
#include <stdint.h>

#include "transport/bus.h"

#define FEATURE_HYPERCALL_NOTIFY (1ull << 44) /* VIRTIO_F_HYPERCALL_NOTIFY, our name */

struct queue;

/* One queue's. The counters live as long as the program. */
struct doorbell {
	bool fast;		  /* rings by hypercall */
	uint32_t id;		  /* the connection id: bell number xor platform key */
	uint32_t plain_since;	  /* plain rings since the fast path was left */
	const char *plain_reason; /* why not fast */
	uint32_t hypercall;
	uint32_t plain;
	uint32_t refused; /* hypercalls with a status other than 0: each was followed by a plain ring */
	uint32_t suppressed;
	uint32_t rearmed;
};

/* Look for the platform key, once. Nothing is tried: CPUID alone decides. */
void doorbell_find_platform(void);

/* Whether a device may be asked for its key at all: the doorbell was not told to be a plain one. */
bool doorbell_may_be_fast(void);

/* Choose the doorbell of a queue of a device whose features are negotiated. */
int doorbell_choose(struct queue *queue);

void doorbell_ring(struct queue *queue);

/* Ring by a plain doorbell with any number: for queues that do not exist. */
void doorbell_ring_mmio(const struct bus *bus, uint32_t number);
void doorbell_ring_pio(const struct bus *bus, uint32_t number);

#endif
