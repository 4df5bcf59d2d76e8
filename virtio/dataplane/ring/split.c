/* The split ring, section 2.7. Compiled twice, see ring/area.h. */
#include "ring/area.h"

#define VRING_AVAIL_F_NO_INTERRUPT 1
#define VRING_USED_F_NO_NOTIFY 1

/* Offsets in 16-bit words: avail and used both begin with flags and idx. */
#define FLAGS 0
#define IDX 1
#define RING 2

#ifdef RING_SCATTERED
#define DESC(vq, word) ((uint64_t *)ring_word(vq, AREA_DESC, 8 * (uint32_t)(word)))
#define AVAIL(vq, word) ((uint16_t *)ring_word(vq, AREA_AVAIL, 2 * (uint32_t)(word)))
#define USED(vq, word) ((uint16_t *)ring_word(vq, AREA_USED, 2 * (uint32_t)(word)))
/* The two halves of a used element may lie in two pages: it begins 4 bytes behind a multiple of 8. */
#define USED_ID(vq, index) ((uint32_t *)USED(vq, RING + 4 * (index)))
#define USED_LEN(vq, index, id) ((void)(id), (uint32_t *)USED(vq, RING + 4 * (index) + 2))
#else
#define DESC(vq, word) (&(vq)->split.desc[word])
#define AVAIL(vq, word) (&(vq)->split.avail[word])
#define USED(vq, word) (&(vq)->split.used[word])
#define USED_ID(vq, index) ((uint32_t *)USED(vq, RING) + 2 * (index))
#define USED_LEN(vq, index, id) ((id) + 1)
#endif

static void split_areas(const struct virtqueue *vq, uint64_t sizes[3])
{
	/* 2.7.2; each ring has its event word at the end, used or not. */
	sizes[0] = 16ull * vq->size;
	sizes[1] = 6 + 2ull * vq->size;
	sizes[2] = 6 + 8ull * vq->size;
}

static void split_attach(struct virtqueue *vq, uint8_t *desc, uint8_t *avail, uint8_t *used)
{
	vq->split.desc = (const uint64_t *)desc;
	vq->split.avail = (const uint16_t *)avail;
	vq->split.used = (uint16_t *)used;
	if (!vq->split.started) {
		uint16_t base = vq->split.last_avail, done = load_relaxed(USED(vq, IDX));

		/*
		 * A device may start in a ring that another one served before: the used index in memory is the
		 * driver's truth, the avail position comes with the base. A base that no device can have stopped at is
		 * none (what it has taken and not used is at most a ring), and what is answered in order has been
		 * taken up to the used index: front-ends that lost their back-end give 0 (DPDK's).
		 */
		if (base != done && (vq->in_order || (uint16_t)(base - done) > vq->size)) {
			vq->split.last_avail = vq->split.avail_seen = done;
			virtqueue_moved(vq, base, done);
		}
		vq->split.used_idx = done;
		vq->split.started = true;
	}
}

static int split_set_base(struct virtqueue *vq, uint32_t base)
{
	if (base > UINT16_MAX)
		return DP_E_BASE;
	vq->split = (struct split_ring){ .last_avail = (uint16_t)base, .avail_seen = (uint16_t)base };
	return 0;
}

static uint32_t split_base(const struct virtqueue *vq)
{
	return vq->split.last_avail;
}

static int split_pop(struct virtqueue *vq, struct chain_view *chain)
{
	struct split_ring *r = &vq->split;
	uint32_t mask = vq->size - 1, steps = 0;
	uint16_t head, at;
	struct desc d;
	int rc;

	if (r->avail_seen == r->last_avail) {
		r->avail_seen = load_acquire(AVAIL(vq, IDX));
		if (r->avail_seen == r->last_avail)
			return VQ_EMPTY;
		/* 2.7.13: the driver never has more than the queue's size outstanding. */
		if (unlikely((uint16_t)(r->avail_seen - r->last_avail) > vq->size))
			return virtqueue_fail(vq, VQ_FAULT_AVAIL_INDEX, r->avail_seen, 0, r->last_avail);
	}
	head = at = load_relaxed(AVAIL(vq, RING + (r->last_avail & mask)));
	if (unlikely(head >= vq->size))
		return virtqueue_fail(vq, VQ_FAULT_HEAD, head, 0, vq->size);
	chain_begin(chain);
	for (;;) {
		uint64_t lo = load_relaxed(DESC(vq, 2 * at)), hi = load_relaxed(DESC(vq, 2 * at + 1));

		d = desc_unpack(lo, hi, false);
		if (d.flags & VRING_DESC_F_INDIRECT) {
			rc = chain_add_indirect(vq, chain, &d, head, false);
			if (unlikely(rc))
				return rc;
			break; /* 2.7.5.3.2: only as the last of a chain */
		}
		rc = chain_add(vq, chain, &d, head);
		if (unlikely(rc))
			return rc;
		if (!(d.flags & VRING_DESC_F_NEXT))
			break;
		/* 2.7.5.3.1: no chain is longer than the queue; one that is has a loop in it. */
		if (unlikely(++steps >= vq->size))
			return virtqueue_fail(vq, VQ_FAULT_CHAIN_LENGTH, head, 0, steps);
		if (unlikely(d.next >= vq->size))
			return virtqueue_fail(vq, VQ_FAULT_NEXT, head, d.next, vq->size);
		at = d.next;
	}
	chain->head = head;
	chain->slots = steps + 1;
	r->last_avail++; /* not before the chain is whole: a miss takes it up again from its head */
	return VQ_CHAIN;
}

static void split_push(struct virtqueue *vq, uint32_t head, uint32_t slots, uint32_t written)
{
	struct split_ring *r = &vq->split;
	uint32_t *id = USED_ID(vq, r->used_idx & (vq->size - 1)), *len = USED_LEN(vq, r->used_idx & (vq->size - 1), id);

	(void)slots;
	store_relaxed(id, head);
	store_relaxed(len, written);
	r->used_idx++;
}

static void split_publish(struct virtqueue *vq)
{
	store_release(USED(vq, IDX), vq->split.used_idx); /* 2.7.8.1: elements before the index */
}

static void split_rewind(struct virtqueue *vq, uint32_t chains, uint32_t slots)
{
	(void)slots;
	vq->split.last_avail = (uint16_t)(vq->split.last_avail - chains);
}

static bool split_needs_notify(struct virtqueue *vq)
{
	struct split_ring *r = &vq->split;
	uint16_t old = r->signalled_used;
	bool valid = r->signalled_valid;

	__atomic_thread_fence(__ATOMIC_SEQ_CST); /* the index is out before the driver's wish is read, 2.7.10.1 */
	if (!vq->event_idx)
		return !(load_relaxed(AVAIL(vq, FLAGS)) & VRING_AVAIL_F_NO_INTERRUPT);
	r->signalled_used = r->used_idx;
	r->signalled_valid = true;
	return !valid || vring_need_event(load_relaxed(AVAIL(vq, RING + vq->size)), r->used_idx, old);
}

static bool split_has_work(const struct virtqueue *vq)
{
	const struct split_ring *r = &vq->split;

	return r->avail_seen != r->last_avail || load_relaxed(AVAIL(vq, IDX)) != r->last_avail;
}

static uint32_t split_waiting(const struct virtqueue *vq)
{
	uint32_t count = (uint16_t)(load_relaxed(AVAIL(vq, IDX)) - vq->split.last_avail);

	return count < vq->size ? count : vq->size;
}

static void split_arm(struct virtqueue *vq)
{
	struct split_ring *r = &vq->split;

	if (vq->event_idx)
		store_relaxed(USED(vq, RING + 4 * vq->size), r->last_avail); /* avail_event, 2.7.10 */
	else
		store_relaxed(USED(vq, FLAGS), 0);
	__atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish is out before the ring is looked at again */
}

static void split_disarm(struct virtqueue *vq)
{
	/* With EVENT_IDX there is nothing to do: the driver has passed avail_event and won't kick until it is moved. */
	if (!vq->event_idx)
		store_relaxed(USED(vq, FLAGS), VRING_USED_F_NO_NOTIFY);
}

const struct ring_ops RING_OPS(split) = {
	.flat = &split_ops,
	.scattered = &split_scattered_ops,
	.areas = split_areas,
	.attach = split_attach,
	.set_base = split_set_base,
	.base = split_base,
	.pop = split_pop,
	.push = split_push,
	.publish = split_publish,
	.rewind = split_rewind,
	.needs_notify = split_needs_notify,
	.has_work = split_has_work,
	.waiting = split_waiting,
	.arm = split_arm,
	.disarm = split_disarm,
};
