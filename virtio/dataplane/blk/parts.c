/*
 * Requests that are too long for one turn of their queue. A driver may ask for gigabytes with one chain, the same page
 * again and again, and whoever shares the worker would wait for all of it. What is copied by the worker itself is done
 * here, a part in each turn; of what goes through the reactor each part is limited here.
 */
#include "blk/blk.h"

bool blk_is_long(const struct blk_request *q)
{
	return blk_bytes(q) > BLK_PART;
}

int blk_parts_begin(struct blk_device *blk, struct worker *w, struct virtqueue *vq, const struct chain_view *chain,
		    struct blk_request *q, uint64_t start_ns)
{
	struct request *r = request_start(w, vq, &blk->native, chain, start_ns);

	if (!r)
		return VIRTIO_BLK_S_IOERR;
	r->op = q->op;
	r->status_hva = q->status_hva;
	r->bytes = blk_bytes(q);
	if (blk_transfers(q->op)) {
		if (!blk_keep_pieces(r, q)) {
			blk_finish(r, VIRTIO_BLK_S_IOERR);
			return BLK_PENDING;
		}
		r->offset = q->sector << SECTOR_SHIFT;
		r->length = q->data_len;
	} else {
		blk_keep_segments(r, q);
	}
	vq->unfinished = r;
	return BLK_PENDING;
}

static int part_do(struct blk_device *blk, struct blk_request *q)
{
	if (blk->setup.backend != BLK_BACKEND_MEMORY)
		return blk_file_now(blk, q);
	if (q->segment_count)
		blk_memory_zero(blk, q);
	else
		blk_memory_copy(blk, q);
	return VIRTIO_BLK_S_OK;
}

/* The next part of a transfer. Its pieces are a copy: who transfers them may pass over some. */
static int transfer_part(struct request *r)
{
	struct blk_request q = { .op = r->op, .sector = r->offset >> SECTOR_SHIFT, .data = r->worker->scratch };
	uint64_t left = r->length < BLK_PART ? r->length : BLK_PART;

	q.data_len = left;
	r->offset += left;
	r->length -= left;
	for (const struct iovec *piece = r->io_iov; left; piece++) {
		uint64_t n = piece->iov_len < left ? piece->iov_len : left;

		q.data[q.data_count++] = (struct iovec){ piece->iov_base, n };
		left -= n;
	}
	iov_skip(&r->io_iov, &r->io_count, q.data_len);
	return part_do((struct blk_device *)r->device, &q);
}

static int segment_part(struct request *r)
{
	struct blk_segment *s = &r->segments[r->segment];
	struct blk_request q = { .op = r->op, .segment_count = 1, .segments = { *s } };

	if (s->sectors > BLK_PART >> SECTOR_SHIFT)
		q.segments[0].sectors = BLK_PART >> SECTOR_SHIFT;
	s->sector += q.segments[0].sectors;
	s->sectors -= q.segments[0].sectors;
	if (s->sectors == 0)
		r->segment++;
	return part_do((struct blk_device *)r->device, &q);
}

/* Zeroes are cheap where there is nothing yet, so a turn has as many parts as there is time for. */
bool blk_proceed(struct request *r)
{
	uint64_t start = now_ns();
	int status;

	do {
		if (load_relaxed(&r->vq->fault)) /* the driver gets nothing back any more */
			status = VIRTIO_BLK_S_IOERR;
		else
			status = blk_transfers(r->op) ? transfer_part(r) : segment_part(r);
		if (status != VIRTIO_BLK_S_OK || (blk_transfers(r->op) ? r->length == 0 : r->segment == r->segment_count)) {
			blk_finish(r, status);
			return true;
		}
	} while (!blk_transfers(r->op) && now_ns() - start < r->worker->turn_ns);
	return false;
}
