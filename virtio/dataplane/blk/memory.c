/* The block device's memory back end: copies, and pages given back. */
#include "blk/blk.h"

#include <sys/mman.h>
#include <unistd.h>

void blk_memory_copy(struct blk_device *blk, struct blk_request *q)
{
	uint8_t *at = blk->memory + (q->sector << SECTOR_SHIFT);

	for (uint32_t i = 0; i < q->data_count; i++) {
		if (q->op == BLK_OP_READ)
			memcpy(q->data[i].iov_base, at, q->data[i].iov_len);
		else
			memcpy(at, q->data[i].iov_base, q->data[i].iov_len);
		at += q->data[i].iov_len;
	}
}

void blk_memory_zero(struct blk_device *blk, const struct blk_request *q)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

	for (uint32_t i = 0; i < q->segment_count; i++) {
		uint64_t first = q->segments[i].sector << SECTOR_SHIFT;
		uint64_t end = first + ((uint64_t)q->segments[i].sectors << SECTOR_SHIFT);
		uint64_t whole = (first + page - 1) & ~(page - 1), whole_end = end & ~(page - 1);

		if (whole >= whole_end) {
			memset(blk->memory + first, 0, end - first);
			continue;
		}
		memset(blk->memory + first, 0, whole - first);
		madvise(blk->memory + whole, whole_end - whole, MADV_DONTNEED); /* gives the pages back, reads zeroes */
		memset(blk->memory + whole_end, 0, end - whole_end);
	}
}
