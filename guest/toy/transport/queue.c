/* The split ring: descriptors, the available and the used ring, and when the device wants to know. */
#include "transport/queue.h"

#include "start/cpu.h"
#include "start/memory.h"
#include "start/report.h"

#define DESCRIPTOR_NEXT 1
#define DESCRIPTOR_WRITE 2
#define USED_NO_NOTIFY 1

void queue_empty(struct queue *queue, struct bus *bus, uint32_t index, uint32_t size, bool event_idx)
{
	uint16_t i;

	if (!queue->rings)
		queue->rings = memory_take(sizeof(*queue->rings), sizeof(*queue->rings));
	memset((void *)(uintptr_t)queue->rings, 0, sizeof(*queue->rings));
	queue->bus = bus;
	queue->index = index;
	queue->size = size;
	queue->event_idx = event_idx;
	queue->free_head = 0;
	queue->free_count = (uint16_t)size;
	queue->available_index = 0;
	queue->published_index = 0;
	queue->used_index = 0;
	for (i = 0; i < size; i++) {
		queue->chains[i].length = 0;
		queue->rings->descriptors[i].next = (uint16_t)(i + 1);
	}
}

static volatile uint16_t *used_event(const struct queue *queue)
{
	return &queue->rings->available.ring[queue->size];
}

static uint16_t available_event(const struct queue *queue)
{
	return (uint16_t)queue->rings->used.ring[queue->size].id;
}

bool queue_add(struct queue *queue, const struct queue_buffer *buffers, uint32_t readable, uint32_t writable,
	       void *token)
{
	uint32_t count = readable + writable, i;
	uint16_t head = queue->free_head, at = head;

	if (count > queue->free_count)
		return false;
	for (i = 0; i < count; i++) {
		volatile struct descriptor *descriptor = &queue->rings->descriptors[at];

		descriptor->gpa = (uintptr_t)buffers[i].data;
		descriptor->length = buffers[i].length;
		descriptor->flags = (uint16_t)((i < readable ? 0 : DESCRIPTOR_WRITE) |
					       (i + 1 < count ? DESCRIPTOR_NEXT : 0));
		at = descriptor->next;
	}
	queue->free_head = at;
	queue->free_count = (uint16_t)(queue->free_count - count);
	queue->chains[head].token = token;
	queue->chains[head].length = (uint16_t)count;
	queue->rings->available.ring[queue->available_index & (queue->size - 1)] = head;
	queue->available_index++;
	return true;
}

void queue_publish(struct queue *queue)
{
	uint16_t old = queue->published_index, new = queue->available_index;
	bool wanted;

	if (old == new)
		return;
	memory_barrier(); /* 2.7.13.3.1: the entries before the index */
	queue->rings->available.index = new;
	queue->published_index = new;
	memory_barrier(); /* 2.7.13.4.1: the index before the look at the device's wishes */
	if (queue->event_idx)
		wanted = (uint16_t)(new - available_event(queue) - 1) < (uint16_t)(new - old);
	else
		wanted = !(queue->rings->used.flags & USED_NO_NOTIFY);
	if (wanted)
		doorbell_ring(queue);
	else
		queue->doorbell.suppressed++;
}

bool queue_has_used(const struct queue *queue)
{
	return queue->rings->used.index != queue->used_index;
}

void *queue_take(struct queue *queue, uint32_t *length)
{
	volatile struct descriptor *descriptor;
	uint32_t id, slot, count;
	uint16_t at;

	if (!queue_has_used(queue)) {
		if (!queue->event_idx)
			return NULL;
		*used_event(queue) = queue->used_index; /* an interrupt for the next one, please */
		memory_barrier();
		if (!queue_has_used(queue))
			return NULL;
	}
	memory_barrier();
	slot = queue->used_index & (queue->size - 1);
	id = queue->rings->used.ring[slot].id;
	if (id >= queue->size || !queue->chains[id].length) {
		queue->bus->broken = true;
		report_error("%s: queue %u gave back chain %u, which is not in flight", queue->bus->name, queue->index,
			     id);
		return NULL;
	}
	*length = queue->rings->used.ring[slot].length;
	queue->used_index++;
	at = (uint16_t)id;
	for (count = queue->chains[id].length; count > 1; count--)
		at = queue->rings->descriptors[at].next;
	descriptor = &queue->rings->descriptors[at];
	descriptor->next = queue->free_head;
	queue->free_head = (uint16_t)id;
	queue->free_count = (uint16_t)(queue->free_count + queue->chains[id].length);
	queue->chains[id].length = 0;
	queue->bus->answers++;
	return queue->chains[id].token;
}
