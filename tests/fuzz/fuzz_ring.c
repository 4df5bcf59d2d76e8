/*
 * Invariant: whatever stands in guest memory, and whatever the driver does to it between our steps, the ring code never
 * reads or writes outside guest memory, never writes where the device may not, always ends, and pop answers one of
 * chain, empty, miss, broken: a chain that lies wholly in memory, or a reason.
 *
 * Guest memory is two heap blocks, one right after the other in guest addresses and apart in ours, so that
 * AddressSanitizer sees every byte beyond. Addresses begin at 0: small numbers in an input are valid ones.
 *
 * Input: flags, size, base (4), image length (2), image, then steps.
 */
#include "fuzz.h"

#define LOW_BYTES 512u
#define HIGH_BYTES 128u
#define MEMORY_BYTES (LOW_BYTES + HIGH_BYTES)
#define UVA 0x10000000ull
#define HELD_MAX 64
#define STEPS_MAX 200

enum { PACKED = 1, EVENT_IDX = 2, INDIRECT = 4, IOMMU = 8, RAW_ADDRESSES = 16, ONE_REGION = 32 };

struct held { /* a chain in flight */
	uint32_t head, slots;
	uint64_t room;
};

struct state {
	struct virtqueue *vq;
	struct mapping maps[2];
	struct memory_table *tables[2]; /* both regions; the low one alone */
	struct iotlb *tlb;
	struct queue_setup setup;
	uint64_t used_first, used_last; /* where the device may write */
	struct held held[HELD_MAX];
	uint32_t held_count;
	uint32_t fault;
	bool gone;
	uint8_t before[MEMORY_BYTES];
};

static uint8_t *byte_at(struct state *s, uint64_t gpa)
{
	return gpa < LOW_BYTES ? s->maps[0].base + gpa : s->maps[1].base + (gpa - LOW_BYTES);
}

static void flatten(const struct state *s, uint8_t *to)
{
	memcpy(to, s->maps[0].base, LOW_BYTES);
	memcpy(to + LOW_BYTES, s->maps[1].base, HIGH_BYTES);
}

/* Nothing changed since `before` was taken but, perhaps, what lies in [first, last). */
static void check_untouched(const struct state *s, uint64_t first, uint64_t last)
{
	uint8_t now[MEMORY_BYTES];

	flatten(s, now);
	if (first > MEMORY_BYTES)
		first = MEMORY_BYTES;
	CHECK(memcmp(now, s->before, first) == 0);
	if (last < MEMORY_BYTES)
		CHECK(memcmp(now + last, s->before + last, MEMORY_BYTES - last) == 0);
}

static bool inside(const struct state *s, const struct iovec *v)
{
	const uint8_t *p = v->iov_base;

	for (int i = 0; i < 2; i++)
		if (p >= s->maps[i].base && p < s->maps[i].base + s->maps[i].size)
			return v->iov_len <= (size_t)(s->maps[i].base + s->maps[i].size - p);
	return false;
}

static void check_chain(struct state *s, const struct chain_view *c)
{
	uint64_t sums[2] = { 0, 0 };

	CHECK(c->readable_count + c->writable_count >= 1 && c->readable_count + c->writable_count <= CHAIN_IOV_MAX);
	CHECK(c->descriptors >= 1 && c->descriptors <= CHAIN_DESCRIPTORS_MAX);
	for (uint32_t i = 0; i < c->readable_count + c->writable_count; i++) {
		CHECK(c->iov[i].iov_len > 0 && inside(s, &c->iov[i]));
		sums[i >= c->readable_count] += c->iov[i].iov_len;
	}
	CHECK(sums[0] == c->readable_len && sums[1] == c->writable_len);
	CHECK(sums[0] + sums[1] <= UINT32_MAX);
	CHECK(c->head < (s->setup.features >> 34 & 1 ? 65536u : s->setup.size));
	CHECK(c->slots >= 1 && c->slots <= s->setup.size);
	for (uint32_t i = 0; i < s->held_count; i++)
		CHECK(s->held[i].head != c->head);
}

static void step_pop(struct state *s)
{
	static struct iovec iov[CHAIN_IOV_MAX];
	struct chain_view chain = { .iov = iov };
	struct queue_report report;
	int rc;

	flatten(s, s->before);
	rc = virtqueue_pop(s->vq, &chain);
	check_untouched(s, 0, 0);
	virtqueue_report(s->vq, &report);
	CHECK(rc == VQ_CHAIN || rc == VQ_EMPTY || rc == VQ_MISS || rc == VQ_BROKEN);
	CHECK((rc == VQ_BROKEN) == (report.fault != VQ_FAULT_NONE));
	CHECK(report.fault <= VQ_FAULT_CALL_FD || report.fault == VQ_FAULT_RING_PIECES);
	CHECK(s->fault == VQ_FAULT_NONE || report.fault == s->fault); /* the first reason stays */
	CHECK(!s->gone || rc == VQ_BROKEN || rc == VQ_MISS);
	s->fault = report.fault;
	if (rc == VQ_MISS)
		CHECK(s->setup.features >> 33 & 1 && report.miss);
	if (rc != VQ_CHAIN)
		return;
	check_chain(s, &chain);
	if (s->held_count == HELD_MAX) {
		virtqueue_push(s->vq, chain.head, chain.slots, 0);
		return;
	}
	s->held[s->held_count++] = (struct held){ chain.head, chain.slots, chain.writable_len };
}

static void step_push(struct state *s, uint32_t which, uint64_t written)
{
	struct held h;

	if (s->held_count == 0)
		return;
	which %= s->held_count;
	h = s->held[which];
	s->held[which] = s->held[--s->held_count];
	virtqueue_push(s->vq, h.head, h.slots, (uint32_t)(written < h.room ? written : h.room));
}

static void step(struct state *s, struct input *in)
{
	uint8_t op = (uint8_t)input_take(in, 1);
	uint64_t a, b;

	if (op % 16 == 0) {
		step_pop(s);
		return;
	}
	flatten(s, s->before);
	switch (op % 16) {
	case 1:
		step_push(s, op >> 4, input_take(in, 1));
		break;
	case 2:
		virtqueue_publish(s->vq);
		break;
	case 3:
		virtqueue_publish(s->vq);
		virtqueue_notify(s->vq);
		break;
	case 4:
		virtqueue_arm(s->vq);
		break;
	case 5:
		virtqueue_disarm(s->vq);
		break;
	case 6: /* the driver writes */
		a = input_take(in, 2) % MEMORY_BYTES;
		*byte_at(s, a) = (uint8_t)input_take(in, 1);
		return;
	case 7: /* ... and makes the next one available */
		a = s->setup.avail + 2;
		if (!(s->setup.features >> 34 & 1) && a < LOW_BYTES)
			(*byte_at(s, a))++;
		return;
	case 8:
		virtqueue_set_memory(s->vq, s->tables[op >> 4 & 1]);
		break;
	case 9:
		virtqueue_resume(s->vq);
		break;
	case 10:
		a = input_take(in, 2);
		b = input_take(in, 1);
		iotlb_update(s->tlb, a % 1024, b, UVA + (a >> 10) * 16, op >> 4 & 3);
		break;
	case 11:
		iotlb_invalidate(s->tlb, input_take(in, 2), op >> 4);
		break;
	case 12:
		virtqueue_has_work(s->vq);
		break;
	case 13: /* the memory file was cut */
		if (op >> 4 == 15 && !s->gone) {
			store_release(&s->maps[0].dead, 1);
			__atomic_add_fetch(&sigbus_deaths, 1, __ATOMIC_RELEASE);
			s->gone = true;
		}
		break;
	default: /* the most common sequence, in few bytes */
		step_push(s, 0, 1);
		virtqueue_publish(s->vq);
		virtqueue_notify(s->vq);
		break;
	}
	check_untouched(s, s->used_first, s->used_last);
}

static void set_up(struct state *s, struct input *in, uint8_t flags)
{
	uint32_t size = (uint32_t)input_take(in, 1);
	bool packed = flags & PACKED;
	uint64_t event_size = packed ? 4 : 6 + 2ull * size;

	s->setup = (struct queue_setup){
		.size = size % 4 ? size : 1u << (size >> 2 & 3),
		.base = (uint32_t)input_take(in, 4),
		.space = flags & IOMMU ? VQ_SPACE_IOVA : VQ_SPACE_GPA,
		.features = 1ull << 32 | (uint64_t)!!(flags & EVENT_IDX) << 29 | (uint64_t)!!(flags & INDIRECT) << 28 |
			    (uint64_t)!!(flags & IOMMU) << 33 | (uint64_t)packed << 34,
	};
	event_size = packed ? 4 : 6 + 2ull * s->setup.size;
	s->setup.avail = 16ull * s->setup.size;
	s->setup.used = (s->setup.avail + event_size + 3) & ~3ull;
	if (flags & RAW_ADDRESSES) {
		s->setup.desc = input_take(in, 2);
		s->setup.avail = input_take(in, 2);
		s->setup.used = input_take(in, 2);
	}
	/* Split: the used ring. Packed: descriptors and the device's event word. With overlapping areas: anything. */
	s->used_first = packed ? s->setup.desc : s->setup.used;
	s->used_last = s->setup.used + (packed ? 4 : 6 + 8ull * s->setup.size);
	if (flags & RAW_ADDRESSES || flags & IOMMU)
		s->used_first = 0, s->used_last = MEMORY_BYTES;
}

static void load_image(struct state *s, struct input *in)
{
	uint64_t length = input_take(in, 2) % (MEMORY_BYTES + 1);

	for (uint64_t i = 0; i < length && in->left; i++)
		*byte_at(s, i) = (uint8_t)input_take(in, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	uint8_t flags = (uint8_t)input_take(&in, 1);
	static struct state s;
	struct memory_region regions[2];

	memset(&s, 0, sizeof(s));
	for (int i = 0; i < 2; i++) {
		s.maps[i].size = i ? HIGH_BYTES : LOW_BYTES;
		s.maps[i].base = aligned_alloc(64, s.maps[i].size);
		s.maps[i].refs = 1;
		CHECK(s.maps[i].base);
		memset(s.maps[i].base, 0, s.maps[i].size);
		regions[i] = (struct memory_region){ .gpa = i * LOW_BYTES, .size = s.maps[i].size,
						     .uva = UVA + i * LOW_BYTES, .mapping = &s.maps[i] };
	}
	s.tables[0] = memory_table_new(regions, 2);
	s.tables[1] = memory_table_new(regions, 1);
	s.tlb = iotlb_new();
	s.vq = virtqueue_new(0, -1);
	CHECK(s.tables[0] && s.tables[1] && s.tlb && s.vq);
	set_up(&s, &in, flags);
	load_image(&s, &in);
	if (virtqueue_configure(s.vq, &s.setup, s.tables[!!(flags & ONE_REGION)], s.tlb) == 0)
		for (int steps = 0; in.left && steps < STEPS_MAX; steps++)
			step(&s, &in);
	virtqueue_free(s.vq);
	iotlb_unref(s.tlb);
	memory_table_unref(s.tables[0]);
	memory_table_unref(s.tables[1]);
	for (int i = 0; i < 2; i++) {
		CHECK(s.maps[i].refs == 1); /* nothing holds memory that is no longer used */
		free(s.maps[i].base);
	}
	return 0;
}
