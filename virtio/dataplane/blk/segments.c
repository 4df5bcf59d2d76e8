/*
 * The block device's discard and write-zeroes on files and block devices: a segment after the other, by fallocate or,
 * where that cannot be, by writing zeroes.
 */
#include "blk/blk.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#define ZERO_CHUNK (64u << 10)

static const uint8_t zeroes[ZERO_CHUNK] __attribute__((aligned(4096)));

/* ---- at once ---- */

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

int blk_segments_now(struct blk_device *blk, const struct blk_request *q)
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
		if (rc < 0 && blk->setup.stop_on_error)
			return BLK_AGAIN;
		if (rc < 0) {
			blk_count_error(blk, q->op, -rc);
			return VIRTIO_BLK_S_IOERR;
		}
	}
	return VIRTIO_BLK_S_OK;
}

/* ---- through the reactor ---- */

/*
 * A block device erases whole blocks of its own. Of a discard that covers some in part those are left as they are, for a
 * discard is advice (5.2.6.2: the data may be anything afterwards); false: none is left.
 */
static bool trim(struct request *r, uint32_t align)
{
	uint64_t end = (r->offset + r->length) & ~((uint64_t)align - 1);

	r->offset = (r->offset + align - 1) & ~((uint64_t)align - 1);
	r->length = end > r->offset ? end - r->offset : 0;
	return r->length > 0;
}

void blk_segment_begin(struct request *r)
{
	struct blk_device *blk = (struct blk_device *)r->device;
	const struct blk_segment *s = &r->segments[r->segment];
	uint32_t align = blk->setup.erase_align;
	int mode = fallocate_mode(blk, r->op, s);

	r->offset = s->sector << SECTOR_SHIFT;
	r->length = (uint64_t)s->sectors << SECTOR_SHIFT;
	if ((r->offset | r->length) & (align - 1)) {
		if (r->op != BLK_OP_DISCARD) {
			mode = 0;
		} else if (!trim(r, align)) {
			r->segment++;
			blk_segment_next(r);
			return;
		}
	}
	r->zeroing = mode == 0;
	r->io = r->zeroing ? IO_WRITE : IO_FALLOCATE;
	/* Zeroes in the midst of a larger block of the host's go through the page cache, which knows how to. */
	r->fd = r->zeroing && blk->shares_blocks ? blk->setup.cached_fd : blk->setup.fd;
	r->flags = mode;
	r->io_iov = r->iov;
	r->io_count = 1;
	r->iov[0] = (struct iovec){ (void *)(uintptr_t)zeroes, r->length < ZERO_CHUNK ? r->length : ZERO_CHUNK };
	blk_submit(r);
}

/* Start the next segment of a discard or write-zeroes, or the sync that makes it durable, or finish. */
void blk_segment_next(struct request *r)
{
	struct blk_device *blk = (struct blk_device *)r->device;
	const struct blk_segment *s;
	uint64_t mask = ~((uint64_t)blk->setup.offset_align - 1), end;

	if (unlikely(r->range.claimed))
		blk_range_release(blk, r);
	while (r->segment < r->segment_count && r->segments[r->segment].sectors == 0)
		r->segment++;
	if (r->segment == r->segment_count) {
		if (!blk_writethrough(blk))
			blk_finish(r, VIRTIO_BLK_S_OK);
		else if (blk_sync_failed(blk))
			blk_finish(r, VIRTIO_BLK_S_IOERR);
		else
			blk_sync(blk, r);
		return;
	}
	s = &r->segments[r->segment];
	end = (s->sector + s->sectors) << SECTOR_SHIFT;
	/* What had failed has succeeded. What r now waits for may be kept, and its next try must not wait for r. */
	if (unlikely(r->tried))
		blk_tried(r);
	if (!blk->shares_blocks || blk_range_claim(blk, r, (s->sector << SECTOR_SHIFT) & mask, (end + ~mask) & mask))
		blk_segment_begin(r);
}

void blk_segment_done(struct request *r, int result)
{
	struct blk_device *blk = (struct blk_device *)r->device;

	if (result == -EOPNOTSUPP && !r->zeroing && r->op == BLK_OP_WRITE_ZEROES) {
		/* Zeroes can always be written by hand; on tmpfs and some file systems they must be. */
		if (!(r->flags & FALLOC_FL_PUNCH_HOLE))
			store_relaxed(&blk->no_zero_range, 1);
		else
			r->segments[r->segment].flags = 0;
		blk_segment_next(r);
		return;
	}
	if (result == -EOPNOTSUPP) {
		blk_finish(r, VIRTIO_BLK_S_UNSUPP);
		return;
	}
	if (result < 0) {
		blk_fail(r, -result);
		return;
	}
	if (r->zeroing && r->io == IO_WRITE && (uint64_t)result < r->length) {
		if (result == 0) {
			blk_fail(r, BLK_FILE_ENDED);
			return;
		}
		r->offset += (uint32_t)result;
		r->length -= (uint32_t)result;
		r->iov[0].iov_len = r->length < ZERO_CHUNK ? r->length : ZERO_CHUNK;
		blk_submit(r);
		return;
	}
	r->segment++;
	blk_segment_next(r);
}
