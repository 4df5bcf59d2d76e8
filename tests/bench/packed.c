/* The driver's side of a packed virtqueue (virtio 1.3, 2.8), with the habits of Linux's driver. */

#include "frontend.h"

static uint16_t avail_flags(const struct fe_queue *q)
{
	/* 2.8.1: available is AVAIL = the driver's wrap counter, USED = its inverse */
	return q->avail_wrap ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED;
}

static void advance_avail(struct fe_queue *q)
{
	if (++q->avail_idx == q->setup.queue_size) {
		q->avail_idx = 0;
		q->avail_wrap ^= 1;
	}
}

static void packed_add(struct fe_queue *q, uint32_t id, const struct segment *segments, uint32_t count)
{
	struct packed_desc *ring = q->desc;
	struct packed_desc *head = &ring[q->avail_idx];
	uint16_t head_flags = avail_flags(q);

	if (q->setup.indirect) {
		struct packed_desc *table = (struct packed_desc *)(queue_control(q, id) + 1);

		for (uint32_t i = 0; i < count; i++) { /* 2.8.7: in a table the order is the chain */
			table[i].gpa = segments[i].gpa;
			table[i].len = segments[i].length;
			table[i].id = 0;
			table[i].flags = segments[i].flags;
		}
		head->gpa = queue_control_gpa(q, id) + sizeof(struct control);
		head->len = count * sizeof(*table);
		head->id = id;
		head_flags |= VRING_DESC_F_INDIRECT;
		q->requests[id].ring_descs = 1;
		advance_avail(q);
	} else {
		for (uint32_t i = 0; i < count; i++) {
			struct packed_desc *d = &ring[q->avail_idx];
			uint16_t flags = segments[i].flags | (i + 1 < count ? VRING_DESC_F_NEXT : 0) | avail_flags(q);

			d->gpa = segments[i].gpa;
			d->len = segments[i].length;
			d->id = id;
			if (i)
				d->flags = flags;
			else
				head_flags = flags;
			advance_avail(q);
		}
		q->requests[id].ring_descs = count;
	}
	q->num_added += q->requests[id].ring_descs;
	/* 2.8.6: the first descriptor's flags last, so that the chain appears whole */
	__atomic_store_n(&head->flags, head_flags, __ATOMIC_RELEASE);
}

static int packed_kick_needed(struct fe_queue *q)
{
	struct packed_event *device = q->used;
	uint16_t before = q->avail_idx - q->num_added;
	uint16_t flags, off_wrap, event;

	q->num_added = 0;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	flags = __atomic_load_n(&device->flags, __ATOMIC_ACQUIRE);
	if (flags != VRING_PACKED_EVENT_FLAG_DESC)
		return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
	off_wrap = __atomic_load_n(&device->off_wrap, __ATOMIC_RELAXED);
	event = off_wrap & 0x7fff;
	if (off_wrap >> 15 != q->avail_wrap) /* 2.8.10: the event lies in the round before */
		event -= q->setup.queue_size;
	return event_wanted(event, q->avail_idx, before);
}

static int is_used(const struct fe_queue *q)
{
	const struct packed_desc *ring = q->desc;
	uint16_t flags = __atomic_load_n(&ring[q->last_used].flags, __ATOMIC_ACQUIRE);

	return !!(flags & VRING_PACKED_DESC_F_AVAIL) == q->used_wrap &&
	       !!(flags & VRING_PACKED_DESC_F_USED) == q->used_wrap;
}

static int packed_get(struct fe_queue *q, uint32_t *id, uint32_t *len)
{
	struct packed_desc *ring = q->desc;

	if (!is_used(q))
		return 0;
	if (!q->in_flight)
		return FE_E_BAD_INDEX;
	*id = ring[q->last_used].id;
	*len = ring[q->last_used].len;
	if (*id >= q->slots || !q->requests[*id].in_flight)
		return FE_E_BAD_ID;
	q->last_used += q->requests[*id].ring_descs;
	if (q->last_used >= q->setup.queue_size) {
		q->last_used -= q->setup.queue_size;
		q->used_wrap ^= 1;
	}
	return 1;
}

static void packed_disable_calls(struct fe_queue *q)
{
	struct packed_event *driver = q->avail;

	if (q->event_shadow != VRING_PACKED_EVENT_FLAG_DISABLE) {
		q->event_shadow = VRING_PACKED_EVENT_FLAG_DISABLE;
		__atomic_store_n(&driver->flags, q->event_shadow, __ATOMIC_RELAXED);
	}
}

static int packed_enable_calls(struct fe_queue *q)
{
	struct packed_event *driver = q->avail;
	uint16_t wish = q->setup.event_idx ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE;

	if (q->setup.event_idx)
		__atomic_store_n(&driver->off_wrap, q->last_used | (uint16_t)(q->used_wrap << 15), __ATOMIC_RELAXED);
	if (q->event_shadow != wish) {
		q->event_shadow = wish;
		__atomic_store_n(&driver->flags, wish, __ATOMIC_RELEASE);
	}
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return !is_used(q);
}

static uint32_t packed_published(const struct fe_queue *q)
{
	const struct packed_desc *ring = q->desc;

	return __atomic_load_n(&ring[q->last_used].flags, __ATOMIC_ACQUIRE);
}

static uint32_t packed_kick_wish(const struct fe_queue *q)
{
	const struct packed_event *device = q->used;

	return __atomic_load_n(&device->off_wrap, __ATOMIC_RELAXED) |
	       (uint32_t)__atomic_load_n(&device->flags, __ATOMIC_RELAXED) << 16;
}

const struct ring_ops packed_ops = {
	.add = packed_add,
	.kick_needed = packed_kick_needed,
	.get = packed_get,
	.disable_calls = packed_disable_calls,
	.enable_calls = packed_enable_calls,
	.published = packed_published,
	.kick_wish = packed_kick_wish,
};
