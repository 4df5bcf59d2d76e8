/* The block device's requests, section 5.2.6: read from the chain once, checked, handed to blk/io.c, answered. */
#include "blk/blk.h"

#include "memory/pieces.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define VIRTIO_BLK_T_IN 0
#define VIRTIO_BLK_T_OUT 1
#define VIRTIO_BLK_T_FLUSH 4
#define VIRTIO_BLK_T_FLUSH_OUT 5 /* 5.2.6.3: a legacy driver's other word for it */
#define VIRTIO_BLK_T_GET_ID 8
#define VIRTIO_BLK_T_DISCARD 11
#define VIRTIO_BLK_T_WRITE_ZEROES 13

#define VIRTIO_BLK_ID_BYTES 20

struct blk_header { /* struct virtio_blk_req up to its data */
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

/* Take `length` bytes off the front of the pieces, into `buffer`; the caller knows that they are there. */
static void pieces_take(struct iovec **iov, uint32_t *count, void *buffer, uint64_t length)
{
	uint8_t *to = buffer;

	while (length) {
		uint64_t n = (*iov)->iov_len < length ? (*iov)->iov_len : length;

		memcpy(to, (*iov)->iov_base, n);
		to += n;
		length -= n;
		(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
		(*iov)->iov_len -= n;
		if ((*iov)->iov_len == 0) {
			(*iov)++;
			(*count)--;
		}
	}
}

/*
 * Split a chain into header, data and status. The framing is the driver's affair (2.7.4.1): the header may be spread
 * over several descriptors, or share one with the data, and so may the status byte.
 */
static bool request_read(struct chain_view *chain, struct blk_request *q)
{
	struct iovec *out = chain->iov, *in = chain->iov + chain->readable_count, *last;
	uint32_t out_count = chain->readable_count, in_count = chain->writable_count;
	struct blk_header header;

	if (chain->readable_len < sizeof(header) || chain->writable_len < 1)
		return false;
	pieces_take(&out, &out_count, &header, sizeof(header));
	last = &in[in_count - 1];
	q->status_hva = (uint8_t *)last->iov_base + last->iov_len - 1;
	if (--last->iov_len == 0)
		in_count--;
	q->type = header.type;
	q->sector = header.sector;
	if (chain->readable_len > sizeof(header)) {
		q->data = out;
		q->data_count = out_count;
		q->data_len = chain->readable_len - sizeof(header);
		/* A request that both sends and receives data is none that we know; its type will say so. */
	} else {
		q->data = in;
		q->data_count = in_count;
		q->data_len = chain->writable_len - 1;
	}
	return true;
}

static uint32_t op_of(const struct blk_device *blk, uint32_t type)
{
	switch (type) {
	case VIRTIO_BLK_T_IN: return BLK_OP_READ;
	case VIRTIO_BLK_T_OUT: return BLK_OP_WRITE;
	case VIRTIO_BLK_T_FLUSH: return BLK_OP_FLUSH;
	case VIRTIO_BLK_T_FLUSH_OUT: return load_relaxed(&blk->legacy) ? BLK_OP_FLUSH : BLK_OP_OTHER;
	case VIRTIO_BLK_T_GET_ID: return BLK_OP_GET_ID;
	case VIRTIO_BLK_T_DISCARD: return BLK_OP_DISCARD;
	case VIRTIO_BLK_T_WRITE_ZEROES: return BLK_OP_WRITE_ZEROES;
	default: return BLK_OP_OTHER;
	}
}

static bool range_inside(const struct blk_device *blk, uint64_t sector, uint64_t sectors)
{
	uint64_t capacity = load_relaxed(&blk->capacity);

	return sector <= capacity && sectors <= capacity - sector;
}

/* 5.2.6.2: reads and writes are whole blocks inside the capacity. */
static int check_data(const struct blk_device *blk, const struct blk_request *q)
{
	uint64_t mask = blk->setup.block_size - 1;

	if (q->data_len & mask || q->sector & (mask >> SECTOR_SHIFT))
		return VIRTIO_BLK_S_IOERR;
	return range_inside(blk, q->sector, q->data_len >> SECTOR_SHIFT) ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
}

/* 5.2.6.2: flags first (UNSUPP), then how many and how long the segments are (IOERR). */
static int check_segments(const struct blk_device *blk, struct blk_request *q)
{
	bool discard = q->op == BLK_OP_DISCARD;
	uint32_t known = discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
	uint32_t max = discard ? blk->setup.max_discard_sectors : blk->setup.max_write_zeroes_sectors;
	uint64_t mask = (blk->setup.block_size >> SECTOR_SHIFT) - 1, left = q->data_len;

	if (!(discard ? load_relaxed(&blk->discards) : load_relaxed(&blk->zeroes)))
		return VIRTIO_BLK_S_UNSUPP;
	if (left == 0 || left % sizeof(q->segments[0]) || left > sizeof(q->segments))
		return VIRTIO_BLK_S_IOERR;
	q->segment_count = (uint32_t)(left / sizeof(q->segments[0]));
	pieces_take(&q->data, &q->data_count, q->segments, left);
	for (uint32_t i = 0; i < q->segment_count; i++)
		if (q->segments[i].flags & ~known)
			return VIRTIO_BLK_S_UNSUPP;
	for (uint32_t i = 0; i < q->segment_count; i++) {
		const struct blk_segment *s = &q->segments[i];

		if (s->sectors > max || s->sector & mask || s->sectors & mask || !range_inside(blk, s->sector, s->sectors))
			return VIRTIO_BLK_S_IOERR;
	}
	return VIRTIO_BLK_S_OK;
}

static int get_id(const struct blk_device *blk, struct blk_request *q)
{
	struct pieces to = pieces_of(q->data, q->data_count);

	q->data_len = pieces_write(&to, blk->setup.serial, VIRTIO_BLK_ID_BYTES); /* what was written */
	return VIRTIO_BLK_S_OK;
}

static int request_check(struct blk_device *blk, const struct chain_view *chain, struct blk_request *q)
{
	bool sends = chain->readable_len > sizeof(struct blk_header), receives = chain->writable_len > 1;
	bool writes = q->op == BLK_OP_WRITE || q->op == BLK_OP_DISCARD || q->op == BLK_OP_WRITE_ZEROES;

	/* 5.2.6.2: read-only is enforced whether or not the driver took VIRTIO_BLK_F_RO. */
	if (writes && blk->setup.read_only)
		return VIRTIO_BLK_S_IOERR;
	if ((writes && receives) || (!writes && sends))
		return q->op == BLK_OP_OTHER ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
	switch (q->op) {
	case BLK_OP_READ:
	case BLK_OP_WRITE:
		return check_data(blk, q);
	case BLK_OP_DISCARD:
	case BLK_OP_WRITE_ZEROES:
		return check_segments(blk, q);
	case BLK_OP_FLUSH:
	case BLK_OP_GET_ID:
		return VIRTIO_BLK_S_OK;
	default:
		return VIRTIO_BLK_S_UNSUPP;
	}
}

static int64_t blk_serve(struct native_device *device, struct worker *w, struct virtqueue *vq,
			 struct chain_view *chain, uint64_t start_ns)
{
	struct blk_device *blk = (struct blk_device *)device;
	struct blk_request q;
	uint32_t written;
	int status;

	q.segment_count = 0;
	if (unlikely(!request_read(chain, &q))) {
		/* No place for a status: the one mistake that cannot be answered, so the queue breaks. */
		virtqueue_fail(vq, VQ_FAULT_SHAPE, chain->head, chain->readable_len, chain->writable_len);
		return SERVE_BROKEN;
	}
	q.op = op_of(blk, q.type);
	status = request_check(blk, chain, &q);
	if (status == VIRTIO_BLK_S_OK)
		status = q.op == BLK_OP_GET_ID ? get_id(blk, &q) : blk_io(blk, w, vq, chain, &q, start_ns);
	if (status == BLK_PENDING)
		return SERVE_ASYNC;
	*q.status_hva = (uint8_t)status;
	op_stats_add(&vq->stats.ops[q.op], now_ns() - start_ns, status ? 0 : blk_bytes(&q), status != VIRTIO_BLK_S_OK);
	written = 1;
	if (status == VIRTIO_BLK_S_OK && (q.op == BLK_OP_READ || q.op == BLK_OP_GET_ID))
		written += (uint32_t)q.data_len;
	return written;
}

static void blk_free(struct native_device *device)
{
	struct blk_device *blk = (struct blk_device *)device;

	if (blk->memory)
		munmap(blk->memory, blk->setup.capacity << SECTOR_SHIFT);
	if (blk->setup.fd >= 0)
		close(blk->setup.fd);
	if (blk->setup.cached_fd >= 0)
		close(blk->setup.cached_fd);
	blk_flush_free(blk);
	pthread_mutex_destroy(&blk->ranges.mutex);
	pthread_mutex_destroy(&blk->kept.mutex);
	free(blk);
}

static const struct native_ops blk_ops = {
	.serve = blk_serve,
	.io_done = blk_io_done,
	.proceed = blk_proceed,
	.resumed = blk_resumed,
	.drain = blk_drain,
	.free = blk_free,
};

struct native_device *blk_new(const struct blk_setup *setup, int *error)
{
	struct blk_device *blk = calloc(1, sizeof(*blk));

	*error = -ENOMEM;
	if (!blk)
		return NULL;
	blk->native.ops = &blk_ops;
	blk->native.refs = 1;
	blk->native.queues = setup->queues;
	blk->setup = *setup;
	blk->setup.cached_fd = -1;
	blk->setup.erase_align = setup->erase_align ? setup->erase_align : 1;
	pthread_mutex_init(&blk->ranges.mutex, NULL);
	pthread_mutex_init(&blk->kept.mutex, NULL);
	blk->kept.last = &blk->kept.first;
	blk->shares_blocks = setup->direct && setup->offset_align > setup->block_size;
	blk->capacity = setup->capacity;
	blk->writeback = 1;
	blk->discards = setup->discard;
	blk->zeroes = setup->write_zeroes;
	if (setup->backend == BLK_BACKEND_MEMORY) {
		blk->memory = mmap(NULL, setup->capacity << SECTOR_SHIFT, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (blk->memory == MAP_FAILED) {
			*error = -errno;
			free(blk);
			return NULL;
		}
		madvise(blk->memory, setup->capacity << SECTOR_SHIFT, MADV_DONTDUMP);
	}
	if (setup->fd >= 0) {
		/* A duplicate shares the open file, and with it the lock: both live until the last of them closes. */
		blk->setup.fd = dup(setup->fd);
		if (blk->setup.fd >= 0 && setup->cached_fd >= 0)
			blk->setup.cached_fd = dup(setup->cached_fd);
		if (blk->setup.fd < 0 || (setup->cached_fd >= 0 && blk->setup.cached_fd < 0)) {
			*error = -errno;
			blk_free(&blk->native);
			return NULL;
		}
	}
	if (blk->setup.fd >= 0 && !setup->inline_io)
		blk->no_nowait = (uint32_t)blk_file_may_block(blk->setup.fd);
	*error = 0;
	return &blk->native;
}

void blk_set_capacity(struct native_device *device, uint64_t sectors)
{
	store_relaxed(&((struct blk_device *)device)->capacity, sectors);
}

void blk_set_writeback(struct native_device *device, uint32_t on)
{
	store_relaxed(&((struct blk_device *)device)->writeback, on);
}

void blk_accept(struct native_device *device, uint32_t discards, uint32_t zeroes, uint32_t legacy)
{
	struct blk_device *blk = (struct blk_device *)device;

	store_relaxed(&blk->discards, discards && blk->setup.discard);
	store_relaxed(&blk->zeroes, zeroes && blk->setup.write_zeroes);
	store_relaxed(&blk->legacy, legacy);
}
