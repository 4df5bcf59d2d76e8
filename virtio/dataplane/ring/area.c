/*
 * Where a ring lies in our memory: each area at one address, or page by page (ring/area.h). Looked up when the ring is
 * first used, when memory changes, and when the IOTLB loses a translation. Driver thread.
 */
#include "ring/area.h"

int virtqueue_translate(struct virtqueue *vq, uint64_t addr, uint64_t len, uint32_t perm, uint8_t **hva)
{
	uint64_t missing = addr;
	int64_t n;

	if (!vq->iotlb)
		n = memory_table_gpa(vq->table, addr, len, hva);
	else
		n = iotlb_translate(vq->iotlb, vq->table, addr, len, perm, hva, &missing);
	if (n == TRANSLATE_MISS)
		return virtqueue_miss(vq, missing, perm);
	if (n <= 0)
		return VQ_BROKEN;
	return n > INT32_MAX ? INT32_MAX : (int)n;
}

/* How many bytes of a ring lie together from `addr` on (> 0), at *hva; or VQ_MISS, or VQ_BROKEN. */
static int ring_translate(struct virtqueue *vq, uint64_t addr, uint64_t len, uint8_t **hva)
{
	int64_t n;

	if (vq->iotlb || vq->space == VQ_SPACE_GPA)
		return virtqueue_translate(vq, addr, len, DP_PERM_READ | DP_PERM_WRITE, hva);
	n = memory_table_uva(vq->table, addr, len, hva);
	return n > 0 ? (int)n : VQ_BROKEN;
}

/*
 * One ring area: page by page into `pages`, and at *flat, which is NULL where it is not contiguous in our memory.
 * 0, VQ_MISS, or VQ_BROKEN with *fault saying why.
 */
static int area_resolve(struct virtqueue *vq, int area, uint64_t addr, uint64_t len, struct ring_pages *pages,
			uint8_t **flat, uint32_t *fault)
{
	static const uintptr_t align[RING_AREAS] = { 16, 2, 4 };
	uint32_t skew = (uint32_t)(addr & (RING_PAGE - 1));
	uintptr_t end = 0;
	bool contiguous = true;

	*fault = VQ_FAULT_RING_ADDRESS;
	if (addr + len < addr)
		return VQ_BROKEN;
	pages->first[area] = pages->count;
	pages->skew[area] = skew;
	for (uint64_t done = 0; done < len;) {
		uint8_t *hva;
		int n = ring_translate(vq, addr + done, len - done, &hva);

		if (n < 0)
			return n;
		if ((uintptr_t)hva % align[area] && done == 0)
			return VQ_BROKEN;
		if (done == 0) {
			*flat = hva;
		} else if ((uintptr_t)hva != end) {
			/* No IOMMU has smaller pages, and no memory region ends in the middle of one. */
			if ((addr + done) % RING_PAGE || (uintptr_t)hva % align[area]) {
				*fault = VQ_FAULT_RING_PIECES;
				return VQ_BROKEN;
			}
			contiguous = false;
		}
		end = (uintptr_t)hva + (uint64_t)n;
		for (uint64_t at = (skew + done) / RING_PAGE; at <= (skew + done + (uint64_t)n - 1) / RING_PAGE; at++)
			pages->page[pages->first[area] + at] = (uintptr_t)hva - (skew + done) + at * RING_PAGE;
		done += (uint64_t)n;
	}
	pages->count += (uint32_t)((skew + len - 1) / RING_PAGE + 1);
	if (!contiguous)
		*flat = NULL;
	return 0;
}

int virtqueue_resolve(struct virtqueue *vq)
{
	const uint64_t addrs[RING_AREAS] = { vq->desc_addr, vq->avail_addr, vq->used_addr };
	uint8_t *flat[RING_AREAS] = { NULL, NULL, NULL };
	struct ring_pages pages = { .count = 0 };
	uint64_t sizes[RING_AREAS];
	uint32_t fault;

	vq->ops->areas(vq, sizes);
	if (vq->iotlb)
		vq->iotlb_generation = iotlb_generation(vq->iotlb); /* before looking: a later change is seen */
	for (int i = 0; i < RING_AREAS; i++) {
		int rc = area_resolve(vq, i, addrs[i], sizes[i], &pages, &flat[i], &fault);

		if (rc == VQ_MISS)
			return VQ_MISS;
		if (rc < 0)
			return virtqueue_fail(vq, fault, 0, addrs[i], sizes[i]);
	}
	/* Until here completions had the ring where it was: its pages, and the table that keeps them mapped. */
	if (flat[AREA_DESC] && flat[AREA_AVAIL] && flat[AREA_USED]) {
		vq->ops = vq->ops->flat;
	} else {
		vq->ops = vq->ops->scattered;
		vq->pages = pages;
	}
	vq->ops->attach(vq, flat[AREA_DESC], flat[AREA_AVAIL], flat[AREA_USED]);
	memory_table_ref(vq->table);
	memory_table_unref(vq->ring_table);
	vq->ring_table = vq->table;
	vq->resolved = true;
	return 0;
}
