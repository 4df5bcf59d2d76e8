/* The driver's side of a split virtqueue (virtio 1.3, 2.7), with the habits of Linux's driver. */

#include "frontend.h"

static uint16_t *used_event(const struct fe_queue *q)
{
	return &((struct split_avail *)q->avail)->ring[q->setup.queue_size];
}

static uint16_t *avail_event(const struct fe_queue *q)
{
	return (uint16_t *)&((struct split_used *)q->used)->ring[q->setup.queue_size];
}

static void write_chain(struct split_desc *table, uint16_t first, const struct segment *segments, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		table[first + i].gpa = segments[i].gpa;
		table[first + i].len = segments[i].length;
		table[first + i].flags = segments[i].flags | (i + 1 < count ? VRING_DESC_F_NEXT : 0);
		table[first + i].next = i + 1 < count ? first + i + 1 : 0;
	}
}

static void split_add(struct fe_queue *q, uint32_t id, const struct segment *segments, uint32_t count)
{
	struct split_avail *avail = q->avail;
	struct split_desc *desc = q->desc;
	uint16_t head = id * q->chain_max; /* each request has ring entries of its own */

	if (q->setup.indirect) {
		write_chain((struct split_desc *)(queue_control(q, id) + 1), 0, segments, count);
		desc[head].gpa = queue_control_gpa(q, id) + sizeof(struct control);
		desc[head].len = count * sizeof(*desc);
		desc[head].flags = VRING_DESC_F_INDIRECT;
		desc[head].next = 0;
	} else {
		write_chain(desc, head, segments, count);
	}
	avail->ring[q->avail_idx & (q->setup.queue_size - 1)] = head;
	q->avail_idx++;
	q->num_added++;
	/* Linux publishes each chain at once and kicks for the batch. */
	__atomic_store_n(&avail->idx, q->avail_idx, __ATOMIC_RELEASE);
}

static int split_kick_needed(struct fe_queue *q)
{
	uint16_t before = q->avail_idx - q->num_added;

	q->num_added = 0;
	/* 2.7.13.4.1: the index must be visible before the device's wish is read */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (q->setup.event_idx)
		return event_wanted(__atomic_load_n(avail_event(q), __ATOMIC_RELAXED), q->avail_idx, before);
	return !(__atomic_load_n(&((struct split_used *)q->used)->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
}

static int split_get(struct fe_queue *q, uint32_t *id, uint32_t *len)
{
	struct split_used *used = q->used;
	uint16_t ready = __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) - q->last_used;
	const struct split_used_elem *elem = &used->ring[q->last_used & (q->setup.queue_size - 1)];

	if (!ready)
		return 0;
	if (ready > q->in_flight)
		return FE_E_BAD_INDEX;
	*id = elem->id / q->chain_max;
	*len = elem->len;
	if (elem->id % q->chain_max || *id >= q->slots) {
		*id = elem->id;
		return FE_E_BAD_ID;
	}
	q->last_used++;
	return 1;
}

static void split_disable_calls(struct fe_queue *q)
{
	struct split_avail *avail = q->avail;

	if (!q->setup.event_idx) {
		__atomic_store_n(&avail->flags, VRING_AVAIL_F_NO_INTERRUPT, __ATOMIC_RELAXED);
		return;
	}
	/* An event index far ahead is never met; move it on before the used index comes near. */
	if ((uint16_t)(q->event_shadow - q->last_used) < 0x4000) {
		q->event_shadow = q->last_used + 0x8000;
		__atomic_store_n(used_event(q), q->event_shadow, __ATOMIC_RELAXED);
	}
}

static int split_enable_calls(struct fe_queue *q)
{
	struct split_avail *avail = q->avail;

	if (q->setup.event_idx) {
		q->event_shadow = q->last_used;
		__atomic_store_n(used_event(q), q->event_shadow, __ATOMIC_RELAXED);
	} else {
		__atomic_store_n(&avail->flags, 0, __ATOMIC_RELAXED);
	}
	/* 2.7.14: look again after the wish is visible, or an element in between would be missed */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&((struct split_used *)q->used)->idx, __ATOMIC_ACQUIRE) == q->last_used;
}

static uint32_t split_published(const struct fe_queue *q)
{
	return __atomic_load_n(&((const struct split_used *)q->used)->idx, __ATOMIC_ACQUIRE);
}

static uint32_t split_kick_wish(const struct fe_queue *q)
{
	if (q->setup.event_idx)
		return __atomic_load_n(avail_event(q), __ATOMIC_RELAXED);
	return __atomic_load_n(&((const struct split_used *)q->used)->flags, __ATOMIC_RELAXED);
}

const struct ring_ops split_ops = {
	.add = split_add,
	.kick_needed = split_kick_needed,
	.get = split_get,
	.disable_calls = split_disable_calls,
	.enable_calls = split_enable_calls,
	.published = split_published,
	.kick_wish = split_kick_wish,
};
