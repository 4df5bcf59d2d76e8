/*
 * The block device's I/O: null, memory, files, block devices.
 *
 * What cannot block is done at once, straight between the file and the guest's pages: memory, and files on tmpfs. Of
 * other buffered files a read is tried with RWF_NOWAIT; what is not in the page cache, and every write, goes to
 * io_uring, the only way to have depth on a real disk.
 */
#include "blk.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/vfs.h>
#include <unistd.h>

#define ZERO_CHUNK (64u << 10)
#define BOUNCE_MAX (256u << 10)

static const uint8_t zeroes[ZERO_CHUNK] __attribute__((aligned(4096)));

int blk_file_inline(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) < 0)
		return -errno;
	return fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC;
}

/* ---- pieces ---- */

/* Skip `n` bytes of the pieces. */
static void pieces_skip(struct iovec **iov, uint32_t *count, uint64_t n)
{
	while (n && *count) {
		if (n < (*iov)->iov_len) {
			(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
			(*iov)->iov_len -= n;
			return;
		}
		n -= (*iov)->iov_len;
		(*iov)++;
		(*count)--;
	}
}

static bool pieces_aligned(const struct iovec *iov, uint32_t count, uint32_t block_size)
{
	for (uint32_t i = 0; i < count; i++)
		if (((uintptr_t)iov[i].iov_base | iov[i].iov_len) & (block_size - 1))
			return false;
	return true;
}

/* ---- at once ---- */

static int write_flags(const struct blk_device *blk)
{
	return blk_writethrough(blk) ? RWF_DSYNC : 0; /* not a write and a sync: one I/O, with FUA where there is FUA */
}

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
 * Read or write as much as `flags` lets us: bytes done. *error is 0, or the errno that stopped it (EIO: the file ends
 * before the capacity).
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
			*error = n < 0 ? errno : EIO;
			break;
		}
		done += (uint64_t)n;
		if (likely(done == q->data_len))
			break;
		pieces_skip(&q->data, &q->data_count, (uint64_t)n);
	}
	return done;
}

static int zero_by_writing(int fd, uint64_t offset, uint64_t length)
{
	while (length) {
		ssize_t n = pwrite(fd, zeroes, length < ZERO_CHUNK ? length : ZERO_CHUNK, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		offset += (uint64_t)n;
		length -= (uint64_t)n;
	}
	return 0;
}

static int fallocate_mode(const struct blk_device *blk, uint32_t op, const struct blk_segment *s)
{
	if (op == BLK_OP_DISCARD || s->flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
		return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	return load_relaxed(&blk->no_zero_range) ? 0 : FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
}

static int segments_now(struct blk_device *blk, const struct blk_request *q)
{
	for (uint32_t i = 0; i < q->segment_count; i++) {
		uint64_t offset = q->segments[i].sector << SECTOR_SHIFT;
		uint64_t length = (uint64_t)q->segments[i].sectors << SECTOR_SHIFT;
		int mode = fallocate_mode(blk, q->op, &q->segments[i]), rc = -EOPNOTSUPP;

		if (length == 0)
			continue;
		if (mode)
			rc = fallocate(blk->setup.fd, mode, (off_t)offset, (off_t)length) < 0 ? -errno : 0;
		if (rc == -EOPNOTSUPP && q->op == BLK_OP_DISCARD)
			return VIRTIO_BLK_S_UNSUPP;
		if (rc == -EOPNOTSUPP)
			rc = zero_by_writing(blk->setup.fd, offset, length);
		if (rc < 0)
			return VIRTIO_BLK_S_IOERR;
	}
	return VIRTIO_BLK_S_OK;
}

static int file_now(struct blk_device *blk, struct blk_request *q)
{
	int error;

	switch (q->op) {
	case BLK_OP_FLUSH:
		return fdatasync(blk->setup.fd) < 0 ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK;
	case BLK_OP_DISCARD:
	case BLK_OP_WRITE_ZEROES:
		return segments_now(blk, q);
	default:
		transfer_now(blk->setup.fd, q, q->op == BLK_OP_WRITE ? write_flags(blk) : 0, &error);
		return error ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK;
	}
}

/* ---- through the reactor ---- */

static void submit(struct request *r)
{
	r->worker->reactor->submit(r->worker, r);
}

static void finish(struct request *r, int status)
{
	bool read = r->op == BLK_OP_READ && status == VIRTIO_BLK_S_OK;

	free(r->bounce);
	free(r->many);
	*r->status_hva = (uint8_t)status;
	request_finish(r, read ? (uint32_t)r->bytes + 1 : 1, status != VIRTIO_BLK_S_OK);
}

/*
 * O_DIRECT wants aligned buffers; the guest's may lie anywhere. What does not fit goes through a buffer of ours, a
 * piece at a time: a request may claim gigabytes (the same page again and again), and there may be hundreds of them.
 */
static bool bounce_begin(struct request *r, uint32_t block_size)
{
	uint64_t size = r->length < BOUNCE_MAX ? r->length : BOUNCE_MAX;

	if (posix_memalign((void **)&r->bounce, block_size < 4096 ? 4096 : block_size, size)) {
		r->bounce = NULL;
		return false;
	}
	r->guest_iov = r->io_iov;
	r->guest_count = r->io_count;
	r->io_iov = &r->bounce_iov;
	r->io_count = 1;
	return true;
}

static void bounce_copy(const struct request *r, uint64_t length)
{
	uint8_t *at = r->bounce;

	for (uint32_t i = 0; length; i++) {
		uint64_t n = r->guest_iov[i].iov_len < length ? r->guest_iov[i].iov_len : length;

		if (r->io == IO_READ)
			memcpy(r->guest_iov[i].iov_base, at, n);
		else
			memcpy(at, r->guest_iov[i].iov_base, n);
		at += n;
		length -= n;
	}
}

static void bounce_submit(struct request *r)
{
	uint64_t length = r->length < BOUNCE_MAX ? r->length : BOUNCE_MAX;

	if (r->io == IO_WRITE)
		bounce_copy(r, length);
	r->bounce_iov = (struct iovec){ r->bounce, length };
	submit(r);
}

/* Start the next segment of a discard or write-zeroes, or the sync that makes it durable, or finish. */
static void segment_next(struct request *r)
{
	struct blk_device *blk = (struct blk_device *)r->device;
	const struct blk_segment *s;
	int mode;

	while (r->segment < r->segment_count && r->segments[r->segment].sectors == 0)
		r->segment++;
	if (r->segment == r->segment_count) {
		if (!blk_writethrough(blk) || r->io == IO_FSYNC) {
			finish(r, VIRTIO_BLK_S_OK);
			return;
		}
		r->io = IO_FSYNC;
		submit(r);
		return;
	}
	s = &r->segments[r->segment];
	mode = fallocate_mode(blk, r->op, s);
	r->offset = s->sector << SECTOR_SHIFT;
	r->length = (uint64_t)s->sectors << SECTOR_SHIFT;
	r->zeroing = mode == 0;
	r->io = r->zeroing ? IO_WRITE : IO_FALLOCATE;
	r->flags = mode;
	r->io_iov = r->iov;
	r->io_count = 1;
	r->iov[0] = (struct iovec){ (void *)(uintptr_t)zeroes, r->length < ZERO_CHUNK ? r->length : ZERO_CHUNK };
	submit(r);
}

static void segment_done(struct request *r, int result)
{
	struct blk_device *blk = (struct blk_device *)r->device;

	if (result == -EOPNOTSUPP && !r->zeroing && r->op == BLK_OP_WRITE_ZEROES) {
		/* Zeroes can always be written by hand; on tmpfs and some file systems they must be. */
		if (!(r->flags & FALLOC_FL_PUNCH_HOLE))
			store_relaxed(&blk->no_zero_range, 1);
		else
			r->segments[r->segment].flags = 0;
		segment_next(r);
		return;
	}
	if (result < 0) {
		finish(r, result == -EOPNOTSUPP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR);
		return;
	}
	if (r->zeroing && r->io == IO_WRITE && (uint64_t)result < r->length) {
		if (result == 0) {
			finish(r, VIRTIO_BLK_S_IOERR);
			return;
		}
		r->offset += (uint32_t)result;
		r->length -= (uint32_t)result;
		r->iov[0].iov_len = r->length < ZERO_CHUNK ? r->length : ZERO_CHUNK;
		submit(r);
		return;
	}
	r->segment++;
	segment_next(r);
}

void blk_io_done(struct request *r, int result)
{
	if (result == -EINTR || result == -EAGAIN) {
		submit(r);
		return;
	}
	if (r->segment_count) {
		if (r->io == IO_FSYNC)
			finish(r, result < 0 ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
		else
			segment_done(r, result);
		return;
	}
	if (r->io == IO_FSYNC) {
		finish(r, result < 0 ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
		return;
	}
	/* Nothing more to read: the image was cut below its capacity. That is an error, never zeroes. */
	if (result <= 0) {
		finish(r, VIRTIO_BLK_S_IOERR);
		return;
	}
	if (r->bounce && r->io == IO_READ)
		bounce_copy(r, (uint32_t)result);
	r->offset += (uint32_t)result;
	r->length -= (uint32_t)result;
	if (r->length == 0) {
		finish(r, VIRTIO_BLK_S_OK);
	} else if (r->bounce) {
		pieces_skip(&r->guest_iov, &r->guest_count, (uint32_t)result);
		bounce_submit(r);
	} else {
		pieces_skip(&r->io_iov, &r->io_count, (uint32_t)result);
		submit(r);
	}
}

/*
 * The request's own copy of its pieces. Beyond SEG_MAX a driver broke its word, or buffers cross memory regions: either
 * is served as it is when the data is in the page cache.
 */
static bool keep_pieces(struct request *r, const struct blk_request *q)
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
	r->bytes = q->data_len;
	if (q->op == BLK_OP_FLUSH) {
		r->bytes = 0;
		r->io = IO_FSYNC;
		submit(r);
		return BLK_PENDING;
	}
	if (q->segment_count) {
		r->bytes = 0;
		for (uint32_t i = 0; i < q->segment_count; i++)
			r->bytes += (uint64_t)q->segments[i].sectors << SECTOR_SHIFT;
		memcpy(r->segments, q->segments, q->segment_count * sizeof(q->segments[0]));
		r->segment_count = q->segment_count;
		r->io = IO_FALLOCATE;
		segment_next(r);
		return BLK_PENDING;
	}
	r->io = q->op == BLK_OP_READ ? IO_READ : IO_WRITE;
	r->flags = q->op == BLK_OP_WRITE ? write_flags(blk) : 0;
	r->offset = (q->sector << SECTOR_SHIFT) + done;
	r->length = q->data_len - done;
	if (!keep_pieces(r, q))
		finish(r, VIRTIO_BLK_S_IOERR);
	else if (!blk->setup.direct || pieces_aligned(r->io_iov, r->io_count, blk->setup.block_size))
		submit(r);
	else if (bounce_begin(r, blk->setup.block_size))
		bounce_submit(r);
	else
		finish(r, VIRTIO_BLK_S_IOERR);
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
	if (blk->setup.inline_io)
		return file_now(blk, q);
	if (q->op == BLK_OP_READ && !blk->setup.direct && !load_relaxed(&blk->no_nowait)) {
		done = transfer_now(blk->setup.fd, q, RWF_NOWAIT, &error);
		if (error == EOPNOTSUPP)
			store_relaxed(&blk->no_nowait, 1);
		else if (error && error != EAGAIN)
			return VIRTIO_BLK_S_IOERR;
		if (done == q->data_len)
			return VIRTIO_BLK_S_OK;
	}
	return start_async(blk, w, vq, chain, q, start_ns, done);
}
