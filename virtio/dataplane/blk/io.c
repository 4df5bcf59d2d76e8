/*
 * The block device's I/O: null, memory, files, block devices.
 *
 * What cannot block is done at once, straight between the file and the guest's pages: memory, and files on tmpfs. Of
 * other buffered files a read is tried with RWF_NOWAIT; what is not in the page cache, and every write, goes to
 * io_uring, the only way to have depth on a real disk.
 */
#include "blk/blk.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

int blk_file_inline(int fd)
{
	struct statfs fs;
	struct stat about;

	if (fstatfs(fd, &fs) < 0 || fstat(fd, &about) < 0)
		return -errno;
	/* The node of a block device lies on a devtmpfs, whose type is that of a tmpfs; its data does not. */
	if (S_ISBLK(about.st_mode))
		return 0;
	return fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC;
}

int blk_file_may_block(int fd)
{
	static uint8_t buffer[4096] __attribute__((aligned(4096)));
	struct iovec piece = { buffer, sizeof(buffer) };

	return preadv2(fd, &piece, 1, 0, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP;
}

/* ---- at once ---- */

static ssize_t transfer_once(int fd, const struct blk_request *q, off_t at, int flags)
{
	/* One piece and no flags is the usual request, and the plain calls are a tenth cheaper. */
	bool plain = q->data_count == 1 && flags == 0;
	int count = (int)(q->data_count < KERNEL_IOV_MAX ? q->data_count : KERNEL_IOV_MAX);

	if (q->op == BLK_OP_READ)
		return plain ? pread(fd, q->data[0].iov_base, q->data[0].iov_len, at)
			     : preadv2(fd, q->data, count, at, flags);
	return plain ? pwrite(fd, q->data[0].iov_base, q->data[0].iov_len, at)
		     : pwritev2(fd, q->data, count, at, flags);
}

/*
 * Read or write as much as `flags` lets us: bytes done. *error is the errno that stopped it, or BLK_FILE_ENDED.
 */
static uint64_t transfer_now(int fd, struct blk_request *q, int flags, int *error)
{
	uint64_t done = 0;
	ssize_t n;

	*error = 0;
	while (done < q->data_len) {
		n = transfer_once(fd, q, (off_t)((q->sector << SECTOR_SHIFT) + done), flags);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			*error = n < 0 ? errno : BLK_FILE_ENDED;
			break;
		}
		done += (uint64_t)n;
		if (likely(done == q->data_len))
			break;
		iov_skip(&q->data, &q->data_count, (uint64_t)n);
	}
	return done;
}

static int flush_now(struct blk_device *blk)
{
	if (fdatasync(blk->setup.fd) == 0)
		return VIRTIO_BLK_S_OK;
	blk_count_sync_error(blk, BLK_OP_FLUSH, errno);
	return VIRTIO_BLK_S_IOERR;
}

int blk_file_now(struct blk_device *blk, struct blk_request *q)
{
	int error;

	switch (q->op) {
	case BLK_OP_FLUSH:
		return flush_now(blk);
	case BLK_OP_DISCARD:
	case BLK_OP_WRITE_ZEROES:
		return blk_segments_now(blk, q);
	default:
		q->done = transfer_now(blk->setup.fd, q, q->op == BLK_OP_WRITE ? blk_write_flags(blk) : 0, &error);
		if (q->done == q->data_len)
			return VIRTIO_BLK_S_OK;
		if (blk->setup.stop_on_error)
			return BLK_AGAIN;
		blk_count_error(blk, q->op, error);
		return VIRTIO_BLK_S_IOERR;
	}
}

/* ---- through the reactor ---- */

void blk_submit(struct request *r)
{
	r->worker->reactor->submit(r->worker, r);
}

void blk_let_go(struct request *r)
{
	if (unlikely(r->range.claimed))
		blk_range_release((struct blk_device *)r->device, r);
	free(r->bounce);
	free(r->many);
}

void blk_finish(struct request *r, int status)
{
	bool read = r->op == BLK_OP_READ && status == VIRTIO_BLK_S_OK;

	if (unlikely(r->tried))
		blk_tried(r);
	blk_let_go(r);
	*r->status_hva = (uint8_t)status;
	request_finish(r, read ? (uint32_t)r->bytes + 1 : 1, status != VIRTIO_BLK_S_OK);
}

void blk_fail(struct request *r, int error)
{
	blk_count_error((struct blk_device *)r->device, r->op, error);
	if (!blk_keep(r, error))
		blk_finish(r, VIRTIO_BLK_S_IOERR);
}

void blk_no_memory(struct request *r)
{
	blk_count_error((struct blk_device *)r->device, r->op, ENOMEM);
	blk_finish(r, VIRTIO_BLK_S_IOERR);
}

void blk_sync_done(struct request *r, int result)
{
	blk_finish(r, result < 0 ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
}

/* Of a file in the page cache the kernel may copy at once what it is handed. */
void blk_submit_part(struct request *r, bool first)
{
	struct blk_device *blk = (struct blk_device *)r->device;

	blk_part_trim(r);
	if (first || blk->setup.direct)
		blk_submit(r);
	else
		worker_submit_part(r->worker, r);
}

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
	r->bytes = q->data_len;
	if (q->op == BLK_OP_FLUSH) {
		r->bytes = 0;
	} else if (q->segment_count) {
		r->bytes = 0;
		for (uint32_t i = 0; i < q->segment_count; i++)
			r->bytes += (uint64_t)q->segments[i].sectors << SECTOR_SHIFT;
		memcpy(r->segments, q->segments, q->segment_count * sizeof(q->segments[0]));
		r->segment_count = q->segment_count;
		r->io = IO_FALLOCATE;
	} else {
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
	if (q->data_len == 0 && (q->op == BLK_OP_READ || q->op == BLK_OP_WRITE))
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
		done = transfer_now(blk->setup.fd, q, RWF_NOWAIT, &error);
		if (error == EOPNOTSUPP)
			store_relaxed(&blk->no_nowait, 1);
		if (done == q->data_len)
			return VIRTIO_BLK_S_OK;
		/* Whatever else it was comes again, and is told by what follows. */
	}
	return start_async(blk, w, vq, chain, q, start_ns, done);
}
