/*
 * The block device's I/O: null, memory, files, block devices.
 *
 * What cannot block is done at once, straight between the file and the guest's pages: memory, and files on tmpfs. Of
 * other buffered files a read is tried with RWF_NOWAIT; what is not in the page cache, and every write, goes to
 * io_uring, the only way to have depth on a real disk.
 */
#include "blk/blk.h"

/*
 * A write that had to be durable may have failed in its sync, and have taken the one report of pages that other writes
 * left (a driver may change its cache mode). Only of these errors it is sure that they came before: out of room.
 */
static void transfer_failed(struct request *r, int error)
{
	if (r->flags & RWF_DSYNC && error != ENOSPC && error != EDQUOT && error != EFBIG)
		blk_count_sync_error((struct blk_device *)r->device, r->op, error);
	else
		blk_count_error((struct blk_device *)r->device, r->op, error);
	if (!blk_keep(r, error))
		blk_finish(r, VIRTIO_BLK_S_IOERR);
}

void blk_io_done(struct request *r, int result)
{
	if (result == -EINTR || result == -EAGAIN) {
		blk_submit(r);
		return;
	}
	if (r->io == IO_FSYNC) {
		blk_sync_ended((struct blk_device *)r->device, r, result);
		return;
	}
	if (r->segment_count) {
		blk_segment_done(r, result);
		return;
	}
	/* Nothing more to read: the image was cut below its capacity. That is an error, never zeroes. */
	if (result <= 0) {
		transfer_failed(r, -result);
		return;
	}
	if (r->bounce) {
		blk_bounce_done(r, (uint32_t)result);
		return;
	}
	r->offset += (uint32_t)result;
	r->length -= (uint32_t)result;
	if (r->length == 0) {
		blk_finish(r, VIRTIO_BLK_S_OK);
	} else {
		blk_part_restore(r);
		iov_skip(&r->io_iov, &r->io_count, (uint32_t)result);
		blk_submit_part(r, false);
	}
}

void blk_begin(struct request *r)
{
	struct blk_device *blk = (struct blk_device *)r->device;

	if (r->op == BLK_OP_FLUSH && blk_sync_failed(blk)) /* while it waited */
		blk_finish(r, VIRTIO_BLK_S_IOERR);
	else if (r->op == BLK_OP_FLUSH)
		blk_sync(blk, r);
	else if (r->segment_count)
		blk_segment_next(r);
	else if (blk->setup.direct)
		blk_direct_begin(r);
	else
		blk_submit_part(r, true);
}

static int start_async(struct blk_device *blk, struct worker *w, struct virtqueue *vq, const struct chain_view *chain,
		       struct blk_request *q, uint64_t start_ns, uint64_t done)
{
	struct request *r;

	r = request_start(w, vq, &blk->native, chain, start_ns);
	if (!r)
		return VIRTIO_BLK_S_IOERR;
	r->op = q->op;
	r->status_hva = q->status_hva;
	r->fd = blk->setup.fd;
	r->flags = 0;
	r->may_block = load_relaxed(&blk->no_nowait);
	r->bytes = blk_bytes(q);
	if (q->segment_count) {
		blk_keep_segments(r, q);
		r->io = IO_FALLOCATE;
	} else if (q->op != BLK_OP_FLUSH) {
		r->io = q->op == BLK_OP_READ ? IO_READ : IO_WRITE;
		r->flags = q->op == BLK_OP_WRITE ? blk_write_flags(blk) : 0;
		r->offset = (q->sector << SECTOR_SHIFT) + done;
		r->length = q->data_len - done;
		if (!blk->setup.direct)
			w->moved += q->data_len;
		if (!blk_keep_pieces(r, q)) {
			blk_no_memory(r);
			return BLK_PENDING;
		}
	}
	if (likely(!load_relaxed(&blk->errors.stopped)) || !blk_waits(r))
		blk_begin(r);
	return BLK_PENDING;
}

int blk_io(struct blk_device *blk, struct worker *w, struct virtqueue *vq, const struct chain_view *chain,
	   struct blk_request *q, uint64_t start_ns)
{
	uint64_t done = 0;
	int error = 0;

	switch (blk->setup.backend) {
	case BLK_BACKEND_NULL:
		return VIRTIO_BLK_S_OK;
	case BLK_BACKEND_MEMORY:
		if (unlikely(blk_is_long(q)))
			return blk_parts_begin(blk, w, vq, chain, q, start_ns);
		if (q->segment_count)
			blk_memory_zero(blk, q);
		else if (q->op != BLK_OP_FLUSH)
			blk_memory_copy(blk, q);
		return VIRTIO_BLK_S_OK;
	default:
		break;
	}
	if (q->data_len == 0 && blk_transfers(q->op))
		return VIRTIO_BLK_S_OK;
	if (q->op == BLK_OP_FLUSH && blk_sync_failed(blk))
		return VIRTIO_BLK_S_IOERR;
	if (unlikely(load_relaxed(&blk->errors.stopped)))
		return start_async(blk, w, vq, chain, q, start_ns, 0);
	if (blk->setup.inline_io && unlikely(blk_is_long(q))) {
		if (!blk->setup.stop_on_error)
			return blk_parts_begin(blk, w, vq, chain, q, start_ns);
	} else if (blk->setup.inline_io) {
		int status;

		q->done = 0;
		status = blk_file_now(blk, q);
		return likely(status != BLK_AGAIN) ? status : start_async(blk, w, vq, chain, q, start_ns, q->done);
	}
	/* A long one is for the reactor, whose parts are counted. */
	if (q->op == BLK_OP_READ && q->data_len <= BLK_PART && !blk->setup.direct && !load_relaxed(&blk->no_nowait)) {
		done = blk_transfer_now(blk->setup.fd, q, RWF_NOWAIT, &error);
		if (error == EOPNOTSUPP)
			store_relaxed(&blk->no_nowait, 1);
		if (done == q->data_len)
			return VIRTIO_BLK_S_OK;
		/* Whatever else it was comes again, and is told by what follows. */
	}
	return start_async(blk, w, vq, chain, q, start_ns, done);
}

void blk_resumed(struct request *r)
{
	struct blk_device *blk = (struct blk_device *)r->device;
	uint8_t kept = r->kept;

	if (!kept) {
		blk_range_granted(r);
		return;
	}
	/* Whatever handed r over has let go of the mutex, and so of r. */
	pthread_mutex_lock(&blk->kept.mutex);
	r->kept = 0;
	pthread_mutex_unlock(&blk->kept.mutex);
	if (kept == BLK_KEPT_WAITING)
		blk_begin(r);
	else
		blk_submit(r); /* the very I/O that failed: what came before in this request is done */
}
