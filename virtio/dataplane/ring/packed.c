/*
 * The packed ring, section 2.8. One area of descriptors, written by both sides; wrap counters tell whose turn it is.
 * Compiled twice, see ring/area.h.
 */
#include "ring/area.h"

#define VRING_PACKED_DESC_F_AVAIL (1u << 7)
#define VRING_PACKED_DESC_F_USED (1u << 15)
#define VRING_PACKED_EVENT_FLAG_ENABLE 0
#define VRING_PACKED_EVENT_FLAG_DISABLE 1
#define VRING_PACKED_EVENT_FLAG_DESC 2

#define INDEX_MASK 0x7fffu
#define WRAP_BIT 15

#ifdef RING_SCATTERED
#define DESC(vq, word) ((uint64_t *)ring_word(vq, AREA_DESC, 8 * (uint32_t)(word)))
#define DRIVER_EVENT(vq) ((uint32_t *)ring_word(vq, AREA_AVAIL, 0))
#define DEVICE_EVENT(vq) ((uint32_t *)ring_word(vq, AREA_USED, 0))
#else
#define DESC(vq, word) (&(vq)->packed.desc[word])
#define DRIVER_EVENT(vq) ((vq)->packed.driver_event)
#define DEVICE_EVENT(vq) ((vq)->packed.device_event)
#endif

static void packed_areas(const struct virtqueue *vq, uint64_t sizes[3])
{
	sizes[0] = 16ull * vq->size;
	sizes[1] = sizes[2] = 4; /* event suppression structures, 2.8.14 */
}

static void packed_attach(struct virtqueue *vq, uint8_t *desc, uint8_t *avail, uint8_t *used)
{
	vq->packed.desc = (uint64_t *)desc;
	vq->packed.driver_event = (uint32_t *)avail;
	vq->packed.device_event = (uint32_t *)used;
}

/* Ring entries that the device has taken and not used yet; more than the queue's size: no such position exists. */
static uint32_t slots_taken(const struct packed_ring *r, uint32_t size)
{
	return r->avail_idx + (r->avail_wrap == r->used_wrap ? 0 : size) - r->used_idx;
}

static int packed_set_base(struct virtqueue *vq, uint32_t base)
{
	uint16_t avail = base & INDEX_MASK, used = base >> 16 & INDEX_MASK;

	/* Some front-ends (DPDK's) give the avail position alone; no ring is where the upper half 0 would then put it. */
	if (base >> 16 == 0 && base >> WRAP_BIT & 1)
		return packed_set_base(vq, base | base << 16);
	if (avail >= vq->size || used >= vq->size)
		return DP_E_BASE;
	vq->packed = (struct packed_ring){
		.avail_idx = avail, .avail_wrap = base >> WRAP_BIT & 1,
		.used_idx = used, .used_wrap = base >> 31 & 1,
	};
	return slots_taken(&vq->packed, vq->size) <= vq->size ? 0 : DP_E_BASE;
}

static uint32_t packed_base(const struct virtqueue *vq)
{
	const struct packed_ring *r = &vq->packed;

	return r->avail_idx | (uint32_t)r->avail_wrap << WRAP_BIT | (uint32_t)r->used_idx << 16 |
	       (uint32_t)r->used_wrap << 31;
}

/* 2.8.1: available when AVAIL matches the device's wrap counter and USED does not. */
static bool is_available(uint16_t flags, bool wrap)
{
	return !!(flags & VRING_PACKED_DESC_F_AVAIL) == wrap && !!(flags & VRING_PACKED_DESC_F_USED) != wrap;
}

static void advance(uint16_t *index, bool *wrap, uint32_t by, uint32_t size)
{
	uint32_t next = *index + by;

	if (next >= size) {
		next -= size;
		*wrap = !*wrap;
	}
	*index = (uint16_t)next;
}

static int packed_pop(struct virtqueue *vq, struct chain_view *chain)
{
	struct packed_ring *r = &vq->packed;
	uint16_t at = r->avail_idx;
	bool wrap = r->avail_wrap;
	uint32_t slots = 0, room = vq->size - slots_taken(r, vq->size);
	struct desc d;
	int rc;

	chain_begin(chain);
	do {
		/* The word with the flags first: what it says was written before it (2.8.21.1 Driver: flags last). */
		uint64_t hi = load_acquire(DESC(vq, 2 * at + 1));

		d = desc_unpack(load_relaxed(DESC(vq, 2 * at)), hi, true);
		if (slots == 0 && !is_available(d.flags, wrap))
			return VQ_EMPTY;
		/* 2.8.17: no chain is longer than the queue. */
		if (unlikely(slots >= vq->size))
			return virtqueue_fail(vq, VQ_FAULT_CHAIN_LENGTH, d.next, 0, slots);
		/* 2.8.16: a driver leaves descriptors alone until it has them back. */
		if (unlikely(slots >= room))
			return virtqueue_fail(vq, VQ_FAULT_AVAIL_INDEX, d.next, 0, slots);
		slots++;
		advance(&at, &wrap, 1, vq->size);
		if (d.flags & VRING_DESC_F_INDIRECT) {
			/* 2.8.7: a table stands alone, never inside a chain. */
			if (unlikely(slots > 1))
				return virtqueue_fail(vq, VQ_FAULT_INDIRECT_NEXT, d.next, d.addr, d.len);
			rc = chain_add_indirect(vq, chain, &d, d.next, true);
		} else {
			rc = chain_add(vq, chain, &d, d.next);
		}
		if (unlikely(rc))
			return rc;
	} while (d.flags & VRING_DESC_F_NEXT);
	chain->head = d.next; /* the buffer id stands in the last descriptor, 2.8.6 */
	chain->slots = slots;
	r->avail_idx = at;
	r->avail_wrap = wrap;
	return VQ_CHAIN;
}

static void packed_push(struct virtqueue *vq, uint32_t head, uint32_t slots, uint32_t written)
{
	struct packed_ring *r = &vq->packed;
	uint16_t flags = (uint16_t)((r->used_wrap ? VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED : 0u) |
				    (written ? VRING_DESC_F_WRITE : 0u));
	uint64_t *word = DESC(vq, 2 * r->used_idx + 1);

	if (r->staged == 0) {
		/* Staged: everything but the flags, so that the driver does not look further before publish. */
		store_relaxed((uint32_t *)word, written);
		store_relaxed((uint16_t *)word + 2, (uint16_t)head);
		r->publish_idx = r->used_idx;
		r->publish_flags = flags;
	} else {
		store_relaxed(word, (uint64_t)written | (uint64_t)head << 32 | (uint64_t)flags << 48);
	}
	r->staged = (uint16_t)(r->staged + slots);
	/* More than a lap since the driver was last asked is a lap: any event it can name was passed. */
	r->signalled_off = (uint16_t)(r->signalled_off + slots < vq->size ? r->signalled_off + slots : vq->size);
	advance(&r->used_idx, &r->used_wrap, slots, vq->size);
}

static void packed_publish(struct virtqueue *vq)
{
	struct packed_ring *r = &vq->packed;

	if (r->staged == 0)
		return;
	store_release((uint16_t *)DESC(vq, 2 * r->publish_idx + 1) + 3, r->publish_flags);
	r->staged = 0;
}

static void packed_rewind(struct virtqueue *vq, uint32_t chains, uint32_t slots)
{
	struct packed_ring *r = &vq->packed;

	(void)chains;
	if (slots > r->avail_idx) {
		r->avail_idx = (uint16_t)(r->avail_idx + vq->size - slots);
		r->avail_wrap = !r->avail_wrap;
	} else {
		r->avail_idx = (uint16_t)(r->avail_idx - slots);
	}
}

static bool packed_needs_notify(struct virtqueue *vq)
{
	struct packed_ring *r = &vq->packed;
	uint16_t new_idx = r->used_idx, old = (uint16_t)(r->used_idx - r->signalled_off), event;
	uint32_t wish;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	r->signalled_off = 0;
	wish = load_relaxed(DRIVER_EVENT(vq));
	switch (wish >> 16 & 3) {
	case VRING_PACKED_EVENT_FLAG_ENABLE:
		return true;
	case VRING_PACKED_EVENT_FLAG_DISABLE:
		return false;
	case VRING_PACKED_EVENT_FLAG_DESC:
		break;
	default: /* 2.8.14 reserves 3: rather one interrupt too many */
		return true;
	}
	if (!vq->event_idx)
		return true;
	event = wish & INDEX_MASK;
	if ((wish >> WRAP_BIT & 1) != r->used_wrap)
		event = (uint16_t)(event - vq->size);
	return vring_need_event(event, new_idx, old);
}

static bool packed_has_work(const struct virtqueue *vq)
{
	const struct packed_ring *r = &vq->packed;

	return is_available((uint16_t)(load_relaxed(DESC(vq, 2 * r->avail_idx + 1)) >> 48), r->avail_wrap);
}

/* The driver makes descriptors available in their order, so the first one that is not is found by halves. */
static uint32_t packed_waiting(const struct virtqueue *vq)
{
	const struct packed_ring *r = &vq->packed;
	uint32_t low = 0, high = vq->size;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2, at = r->avail_idx + middle;
		bool wraps = at >= vq->size;
		uint64_t word = load_relaxed(DESC(vq, 2 * (wraps ? at - vq->size : at) + 1));

		if (is_available((uint16_t)(word >> 48), r->avail_wrap != wraps))
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static void packed_arm(struct virtqueue *vq)
{
	struct packed_ring *r = &vq->packed;
	uint32_t wish = VRING_PACKED_EVENT_FLAG_ENABLE;

	if (vq->event_idx)
		wish = r->avail_idx | (uint32_t)r->avail_wrap << WRAP_BIT | VRING_PACKED_EVENT_FLAG_DESC << 16;
	store_relaxed(DEVICE_EVENT(vq), wish);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static void packed_disarm(struct virtqueue *vq)
{
	store_relaxed(DEVICE_EVENT(vq), VRING_PACKED_EVENT_FLAG_DISABLE << 16);
}

const struct ring_ops RING_OPS(packed) = {
	.flat = &packed_ops,
	.scattered = &packed_scattered_ops,
	.areas = packed_areas,
	.attach = packed_attach,
	.set_base = packed_set_base,
	.base = packed_base,
	.pop = packed_pop,
	.push = packed_push,
	.publish = packed_publish,
	.rewind = packed_rewind,
	.needs_notify = packed_needs_notify,
	.has_work = packed_has_work,
	.waiting = packed_waiting,
	.arm = packed_arm,
	.disarm = packed_disarm,
};
