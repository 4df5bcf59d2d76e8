/*
 * Where the ring code finds its words. split.c and packed.c are compiled twice: as they are, over three flat pointers,
 * and by split_scattered.c and packed_scattered.c over an area's pages, each of which may lie anywhere. Behind an
 * IOMMU the pages of a ring are adjacent by I/O virtual address alone; without one, an area may cross from one memory
 * region into the next. Every word of a ring is aligned to its own size, so no word lies in two pages.
 */
#ifndef HYPERBELL_RING_AREA_H
#define HYPERBELL_RING_AREA_H

#include "ring/virtqueue.h"

#ifdef RING_SCATTERED
#define RING_OPS(format) format##_scattered_ops

static inline void *ring_word(const struct virtqueue *vq, int area, uint32_t offset)
{
	const struct ring_pages *p = &vq->pages;
	uint32_t at = p->skew[area] + offset;

	return (void *)(p->page[p->first[area] + (at >> RING_PAGE_SHIFT)] + (at & (RING_PAGE - 1)));
}
#else
#define RING_OPS(format) format##_ops
#endif

#endif
