/*
 * Direct I/O takes memory, offsets and lengths of the host's alignment, and the guest knows nothing of the host's: its
 * blocks are the configured ones (5.2.4 blk_size), its buffers lie anywhere. What does not fit goes through a buffer of
 * ours, a step at a time: a request may claim gigabytes (the same page again and again), and there may be hundreds.
 *
 * A write that covers a block of the host's in part reads that block, changes its part and writes the whole. Nobody
 * else may write to the block in between, or one of the two writes is lost: blk/ranges.c sees to that.
 */
#include "blk/blk.h"

#include <stdlib.h>

#define BOUNCE_MAX (256u << 10) /* a multiple of every alignment */

static struct blk_device *device_of(const struct request *r)
{
	return (struct blk_device *)r->device;
}

static uint64_t down(const struct request *r, uint64_t offset)
{
	return offset & ~((uint64_t)device_of(r)->setup.offset_align - 1);
}

static uint64_t up(const struct request *r, uint64_t offset)
{
	return down(r, offset + device_of(r)->setup.offset_align - 1);
}

static bool fits(const struct request *r)
{
	const struct blk_setup *setup = &device_of(r)->setup;

	if (r->offset & (setup->offset_align - 1))
		return false;
	for (uint32_t i = 0; i < r->io_count; i++)
		if ((uintptr_t)r->io_iov[i].iov_base & (setup->memory_align - 1) ||
		    r->io_iov[i].iov_len & (setup->offset_align - 1))
			return false;
	return true;
}

static bool bounce_begin(struct request *r)
{
	const struct blk_setup *setup = &device_of(r)->setup;
	uint64_t size = up(r, r->offset + r->length) - down(r, r->offset);
	uint32_t align = setup->memory_align > setup->offset_align ? setup->memory_align : setup->offset_align;

	if (posix_memalign((void **)&r->bounce, align < 4096 ? 4096 : align, size < BOUNCE_MAX ? size : BOUNCE_MAX)) {
		r->bounce = NULL;
		return false;
	}
	r->guest_iov = r->io_iov;
	r->guest_count = r->io_count;
	r->at = r->offset;
	r->io_iov = &r->bounce_iov;
	r->io_count = 1;
	return true;
}

/* Between the buffer, from `skip` on, and the guest's next `length` bytes. */
static void copy(const struct request *r, uint64_t length)
{
	uint8_t *at = r->bounce + r->skip;

	r->worker->moved += length;
	for (uint32_t i = 0; length; i++) {
		uint64_t n = r->guest_iov[i].iov_len < length ? r->guest_iov[i].iov_len : length;

		if (r->op == BLK_OP_READ)
			memcpy(r->guest_iov[i].iov_base, at, n);
		else
			memcpy(at, r->guest_iov[i].iov_base, n);
		at += n;
		length -= n;
	}
}

/* The buffer's first `length` bytes, from or to `offset`. */
static void move(struct request *r, enum io_kind io, uint64_t offset, uint64_t length)
{
	r->io = io;
	r->flags = io == IO_WRITE ? blk_write_flags(device_of(r)) : 0;
	r->offset = offset;
	r->bounce_iov = (struct iovec){ r->bounce, length };
	blk_submit(r);
}

static void step(struct request *r)
{
	uint64_t block = device_of(r)->setup.offset_align, start = down(r, r->at), end = r->at + r->length, length;

	r->skip = (uint32_t)(r->at - start);
	if (r->op == BLK_OP_WRITE && (r->skip || end - start < block)) { /* a block of which a part is written */
		r->stage = BLK_STAGE_AROUND;
		r->piece = end - start < block ? (uint32_t)r->length : (uint32_t)block - r->skip;
		move(r, IO_READ, start, block);
		return;
	}
	r->stage = BLK_STAGE_MOVE;
	length = r->op == BLK_OP_READ ? up(r, end) - start : down(r, end) - start;
	if (length > BOUNCE_MAX)
		length = BOUNCE_MAX;
	r->piece = r->length < length - r->skip ? (uint32_t)r->length : (uint32_t)length - r->skip;
	if (r->op == BLK_OP_WRITE)
		copy(r, r->piece);
	move(r, r->op == BLK_OP_READ ? IO_READ : IO_WRITE, start, length);
}

/* Write the changed block, or, where the image ends inside it, only what the guest wrote. */
static void write_back(struct request *r, uint64_t block_read)
{
	struct blk_device *blk = device_of(r);
	uint64_t block = blk->setup.offset_align;

	copy(r, r->piece);
	if (block_read == block) {
		r->stage = BLK_STAGE_BACK;
		move(r, IO_WRITE, r->at - r->skip, block);
		return;
	}
	/* A whole block would make the image longer. The page cache takes any length. */
	r->stage = BLK_STAGE_CACHED;
	r->fd = blk->setup.cached_fd;
	r->io = IO_WRITE;
	r->flags = blk_write_flags(blk);
	r->offset = r->at;
	r->bounce_iov = (struct iovec){ r->bounce + r->skip, r->piece };
	blk_submit(r);
}

static void advance(struct request *r, uint64_t length)
{
	r->at += length;
	r->length -= length;
	if (r->length == 0) {
		blk_finish(r, VIRTIO_BLK_S_OK);
		return;
	}
	iov_skip(&r->guest_iov, &r->guest_count, length);
	step(r);
}

void blk_bounce_done(struct request *r, uint64_t done)
{
	switch (r->stage) {
	case BLK_STAGE_AROUND:
		write_back(r, done);
		break;
	case BLK_STAGE_BACK:
		if (done == device_of(r)->setup.offset_align)
			advance(r, r->piece);
		else
			blk_fail(r, EIO); /* direct I/O never writes a part of a block */
		break;
	case BLK_STAGE_CACHED:
		r->fd = device_of(r)->setup.fd;
		advance(r, done);
		break;
	default:
		if (r->op == BLK_OP_READ) {
			if (done <= r->skip) {
				blk_fail(r, BLK_FILE_ENDED);
				return;
			}
			done = done - r->skip < r->piece ? done - r->skip : r->piece;
			copy(r, done);
		}
		advance(r, done);
		break;
	}
}

static void begin(struct request *r)
{
	if (fits(r))
		blk_submit_part(r, true);
	else if (bounce_begin(r))
		step(r);
	else
		blk_no_memory(r);
}

void blk_direct_begin(struct request *r)
{
	struct blk_device *blk = device_of(r);

	if (likely(!blk->shares_blocks || r->op != BLK_OP_WRITE))
		begin(r);
	else if (blk_range_claim(blk, r, down(r, r->offset), up(r, r->offset + r->length)))
		begin(r);
}

void blk_range_granted(struct request *r)
{
	if (r->segment_count)
		blk_segment_begin(r);
	else
		begin(r);
}
