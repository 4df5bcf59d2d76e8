/* The pieces of a request that waits for its I/O, and how many of them the reactor gets at once. */
#include "blk/blk.h"

#include <stdlib.h>

/*
 * The request's own copy of its pieces. Beyond SEG_MAX a driver broke its word, or buffers cross memory regions: either
 * is served as it is when the data is in the page cache.
 */
bool blk_keep_pieces(struct request *r, const struct blk_request *q)
{
	r->io_iov = r->iov;
	r->io_count = q->data_count;
	if (unlikely(q->data_count > REQUEST_IOV_MAX)) {
		r->many = malloc(q->data_count * sizeof(q->data[0]));
		if (!r->many)
			return false;
		r->io_iov = r->many;
	}
	memcpy(r->io_iov, q->data, q->data_count * sizeof(q->data[0]));
	return true;
}

void blk_keep_segments(struct request *r, const struct blk_request *q)
{
	memcpy(r->segments, q->segments, q->segment_count * sizeof(q->segments[0]));
	r->segment_count = q->segment_count;
}

void blk_part_trim(struct request *r)
{
	uint64_t left = ((struct blk_device *)r->device)->setup.direct ? BLK_PART_DIRECT : BLK_PART;
	uint32_t count = 0;

	r->whole_count = r->io_count;
	if (likely(r->length <= left))
		return;
	while (left >= r->io_iov[count].iov_len)
		left -= r->io_iov[count++].iov_len;
	if (left) {
		r->trimmed = r->io_iov[count].iov_len - left;
		r->io_iov[count++].iov_len = left;
	}
	r->io_count = count;
}

void blk_part_restore(struct request *r)
{
	if (likely(!r->trimmed && r->io_count == r->whole_count))
		return;
	r->io_iov[r->io_count - 1].iov_len += r->trimmed;
	r->io_count = r->whole_count;
	r->trimmed = 0;
}
