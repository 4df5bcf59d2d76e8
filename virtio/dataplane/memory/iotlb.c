/*
 * The IOTLB of one connection (VIRTIO_F_ACCESS_PLATFORM): I/O virtual ranges to the front-end's user virtual ones.
 *
 * Behind an IOMMU every map and unmap is a message anyway, so one mutex is plain and good enough here; without an
 * IOMMU nothing of this is on the way of a request. An invalidation drops every entry it touches, also those it
 * only touches in part: what is still wanted is asked for again.
 */
#include "memory/memory.h"

#include <pthread.h>
#include <stdlib.h>

#define IOTLB_ENTRIES_MAX 65536

struct iotlb {
	int refs;            /* atomic */
	uint32_t generation; /* atomic; grows with every invalidation, so that queues check their rings again */
	pthread_mutex_t lock; /* guards the rest */
	uint32_t count, capacity;
	struct iotlb_entry { uint64_t first, last, uva; uint32_t perm; } *entries; /* by first, never overlapping */
};

struct iotlb *iotlb_new(void)
{
	struct iotlb *tlb = calloc(1, sizeof(*tlb));

	if (!tlb)
		return NULL;
	tlb->refs = 1;
	pthread_mutex_init(&tlb->lock, NULL);
	return tlb;
}

struct iotlb *iotlb_ref(struct iotlb *tlb)
{
	if (tlb)
		__atomic_add_fetch(&tlb->refs, 1, __ATOMIC_RELAXED);
	return tlb;
}

void iotlb_unref(struct iotlb *tlb)
{
	if (!tlb || __atomic_sub_fetch(&tlb->refs, 1, __ATOMIC_ACQ_REL) > 0)
		return;
	pthread_mutex_destroy(&tlb->lock);
	free(tlb->entries);
	free(tlb);
}

uint32_t iotlb_generation(struct iotlb *tlb)
{
	return load_acquire(&tlb->generation);
}

/* Index of the first entry that ends at or after iova. */
static uint32_t entry_from(const struct iotlb *tlb, uint64_t iova)
{
	uint32_t lo = 0, hi = tlb->count;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (tlb->entries[mid].last < iova)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

static void drop_range(struct iotlb *tlb, uint64_t first, uint64_t last)
{
	uint32_t from = entry_from(tlb, first), to = from;

	while (to < tlb->count && tlb->entries[to].first <= last)
		to++;
	if (to == from)
		return;
	memmove(&tlb->entries[from], &tlb->entries[to], (tlb->count - to) * sizeof(tlb->entries[0]));
	tlb->count -= to - from;
	__atomic_add_fetch(&tlb->generation, 1, __ATOMIC_RELEASE);
}

static uint64_t range_last(uint64_t first, uint64_t size)
{
	return size - 1 > UINT64_MAX - first ? UINT64_MAX : first + (size - 1);
}

int iotlb_update(struct iotlb *tlb, uint64_t iova, uint64_t size, uint64_t uva, uint32_t perm)
{
	uint64_t last;
	uint32_t at;
	int rc = 0;

	if (size == 0 || !(perm & (DP_PERM_READ | DP_PERM_WRITE)) || uva + (size - 1) < uva)
		return -EINVAL;
	last = range_last(iova, size);
	pthread_mutex_lock(&tlb->lock);
	drop_range(tlb, iova, last);
	if (tlb->count == IOTLB_ENTRIES_MAX) { /* a front-end that never invalidates: start over, misses refill it */
		tlb->count = 0;
		__atomic_add_fetch(&tlb->generation, 1, __ATOMIC_RELEASE);
	}
	if (tlb->count == tlb->capacity) {
		uint32_t capacity = tlb->capacity ? tlb->capacity * 2 : 64;
		struct iotlb_entry *grown = realloc(tlb->entries, capacity * sizeof(*grown));

		if (!grown) {
			rc = -ENOMEM;
			goto out;
		}
		tlb->entries = grown;
		tlb->capacity = capacity;
	}
	at = entry_from(tlb, iova);
	memmove(&tlb->entries[at + 1], &tlb->entries[at], (tlb->count - at) * sizeof(tlb->entries[0]));
	tlb->entries[at] = (struct iotlb_entry){ iova, last, uva, perm };
	tlb->count++;
out:
	pthread_mutex_unlock(&tlb->lock);
	return rc;
}

void iotlb_invalidate(struct iotlb *tlb, uint64_t iova, uint64_t size)
{
	if (size == 0)
		return;
	pthread_mutex_lock(&tlb->lock);
	/* All 2^64 bytes have no size that fits: the largest one says so, and the last byte is one of them. */
	drop_range(tlb, iova, size == UINT64_MAX ? UINT64_MAX : range_last(iova, size));
	pthread_mutex_unlock(&tlb->lock);
}

void iotlb_clear(struct iotlb *tlb)
{
	iotlb_invalidate(tlb, 0, UINT64_MAX);
}

int64_t iotlb_translate(struct iotlb *tlb, const struct memory_table *t, uint64_t iova, uint64_t len, uint32_t perm,
			uint8_t **hva, uint64_t *missing)
{
	int64_t got = 0;

	if (len == 0 || len - 1 > UINT64_MAX - iova)
		return TRANSLATE_BAD;
	pthread_mutex_lock(&tlb->lock);
	/* Neighbouring entries are followed for as long as they lie contiguous in our memory, as a ring must. */
	for (uint32_t i = entry_from(tlb, iova); (uint64_t)got < len; i++) {
		uint64_t at = iova + (uint64_t)got, left = len - (uint64_t)got, room;
		uint8_t *piece;
		int64_t n;

		if (i >= tlb->count || at < tlb->entries[i].first) {
			*missing = at;
			got = got ? got : TRANSLATE_MISS;
			break;
		}
		if ((tlb->entries[i].perm & perm) != perm) {
			/* A right that is missing is asked for like an address that is: the guest may widen a mapping. */
			*missing = at;
			got = got ? got : TRANSLATE_MISS;
			break;
		}
		room = tlb->entries[i].last - at;
		if (room != UINT64_MAX && left > room + 1)
			left = room + 1;
		n = memory_table_uva(t, tlb->entries[i].uva + (at - tlb->entries[i].first), left, &piece);
		if (n <= 0) {
			got = got ? got : TRANSLATE_BAD;
			break;
		}
		if (got && piece != *hva + got)
			break;
		if (!got)
			*hva = piece;
		got += n;
		if ((uint64_t)n < left)
			break;
	}
	pthread_mutex_unlock(&tlb->lock);
	return got;
}
