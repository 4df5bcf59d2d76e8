/* A split virtqueue (virtio 1.3, 2.7) as its driver sees it. */
#ifndef TOY_QUEUE_H
#define TOY_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "transport/bus.h"
#include "transport/doorbell.h"

#define QUEUE_SIZE_MAX 16 /* small: many rings round the ring in a short run */

struct descriptor {
	uint64_t gpa;
	uint32_t length;
	uint16_t flags;
	uint16_t next;
};

/* What driver and device share. 2.7: the descriptors aligned to 16 bytes, what the device writes to 4. */
struct queue_rings {
	struct descriptor descriptors[QUEUE_SIZE_MAX];
	struct {
		uint16_t flags;
		uint16_t index;
		uint16_t ring[QUEUE_SIZE_MAX + 1]; /* with used_event behind the last one in use */
	} available;
	struct {
		uint16_t flags;
		uint16_t index;
		struct {
			uint32_t id;
			uint32_t length;
		} ring[QUEUE_SIZE_MAX + 1]; /* with avail_event behind the last one in use */
	} used __attribute__((aligned(64)));
} __attribute__((aligned(4096)));

struct queue_buffer {
	void *data;
	uint32_t length;
};

struct queue {
	struct bus *bus;
	uint32_t index;
	uint32_t size;
	bool event_idx;
	volatile struct queue_rings *rings;
	uint16_t free_head;
	uint16_t free_count;
	uint16_t available_index; /* the next to fill */
	uint16_t published_index; /* what the device has been shown */
	uint16_t used_index;	  /* the next to take */
	struct {
		void *token;
		uint16_t length; /* descriptors; 0: not a head in flight */
	} chains[QUEUE_SIZE_MAX];
	struct doorbell doorbell;
};

/* An empty queue of ``size`` (a power of two) entries. The counters of its doorbell go on. */
void queue_empty(struct queue *queue, struct bus *bus, uint32_t index, uint32_t size, bool event_idx);

/* Make a chain of buffers, first those the device reads, then those it writes. The device sees it from the next
 * queue_publish on. ``token`` comes back from queue_take. False: not enough descriptors are free. */
bool queue_add(struct queue *queue, const struct queue_buffer *buffers, uint32_t readable, uint32_t writable,
	       void *token);

/* Show the device what was added, and ring if it wants to know. */
void queue_publish(struct queue *queue);

/* The token of the next chain that the device gave back, and how many bytes it wrote; NULL: none. */
void *queue_take(struct queue *queue, uint32_t *length);

/* Whether the device has given back something that was not taken yet. */
bool queue_has_used(const struct queue *queue);

#endif
