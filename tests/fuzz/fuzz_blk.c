/*
 * Invariant: whatever a driver sends to the block device, in whatever pieces, the device touches only the pieces it was
 * given and its own disk, answers with the status, length and data that a plain model of section 5.2.6 computes from
 * the same bytes, and leaves the disk as the model's; a request without header or status breaks the queue.
 *
 * Input: device flags, then requests: how the readable and writable bytes are cut, then the readable bytes.
 */
#include "fuzz.h"

#include "blk/blk.h"

#define DISK_BYTES (16u << 10)
#define BUFFER_BYTES 4096u
#define PIECES_MAX 24
#define MAX_DISCARD 8u
#define MAX_ZEROES 12u
#define SERIAL "serial of the fuzzed"

enum { READ_ONLY = 1, DISCARD = 2, WRITE_ZEROES = 4, BLOCK_1024 = 8, SHRUNK = 16 };
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };

struct model {
	uint8_t flags, disk[DISK_BYTES];
	uint64_t capacity, block;
};

struct answer {
	bool broken;
	uint8_t status;
	uint32_t written;
	uint8_t in[BUFFER_BYTES]; /* the writable bytes afterwards */
};

static uint64_t word(const uint8_t *p, size_t size)
{
	struct input in = { p, size };

	return input_take(&in, size);
}

static bool in_range(const struct model *m, uint64_t sector, uint64_t bytes)
{
	if (bytes % m->block || sector % (m->block / 512) || sector > m->capacity)
		return false;
	return bytes / 512 <= m->capacity - sector;
}

/* 5.2.6.2, for what stands in the `count` segments at p. */
static uint8_t model_segments(struct model *m, bool discard, const uint8_t *p, uint64_t length)
{
	uint64_t count = length / 16;

	if (!(m->flags & (discard ? DISCARD : WRITE_ZEROES)))
		return VIRTIO_BLK_S_UNSUPP;
	if (length == 0 || length % 16 || count > BLK_DISCARD_SEGMENTS)
		return VIRTIO_BLK_S_IOERR;
	for (uint64_t i = 0; i < count; i++)
		if (word(p + 16 * i + 12, 4) & ~(discard ? 0ull : 1ull))
			return VIRTIO_BLK_S_UNSUPP;
	for (uint64_t i = 0; i < count; i++) {
		uint64_t sectors = word(p + 16 * i + 8, 4);

		if (sectors > (discard ? MAX_DISCARD : MAX_ZEROES) || !in_range(m, word(p + 16 * i, 8), sectors * 512))
			return VIRTIO_BLK_S_IOERR;
	}
	for (uint64_t i = 0; i < count; i++)
		memset(m->disk + word(p + 16 * i, 8) * 512, 0, word(p + 16 * i + 8, 4) * 512);
	return VIRTIO_BLK_S_OK;
}

static uint8_t model_request(struct model *m, const uint8_t *out, uint64_t out_len, struct answer *a, uint64_t room)
{
	uint64_t type = word(out, 4), sector = word(out + 8, 8), length = out_len - 16;
	bool writes = type == T_OUT || type == T_DISCARD || type == T_WRITE_ZEROES;
	bool known = writes || type == T_IN || type == T_FLUSH || type == T_GET_ID;

	if (!known)
		return VIRTIO_BLK_S_UNSUPP;
	if (writes && m->flags & READ_ONLY)
		return VIRTIO_BLK_S_IOERR;
	if (writes ? room > 0 : length > 0)
		return VIRTIO_BLK_S_IOERR;
	switch (type) {
	case T_IN:
		if (!in_range(m, sector, room))
			return VIRTIO_BLK_S_IOERR;
		memcpy(a->in, m->disk + sector * 512, room);
		a->written += (uint32_t)room;
		return VIRTIO_BLK_S_OK;
	case T_OUT:
		if (!in_range(m, sector, length))
			return VIRTIO_BLK_S_IOERR;
		memcpy(m->disk + sector * 512, out + 16, length);
		return VIRTIO_BLK_S_OK;
	case T_GET_ID:
		memcpy(a->in, SERIAL, room < 20 ? room : 20);
		a->written += room < 20 ? (uint32_t)room : 20;
		return VIRTIO_BLK_S_OK;
	case T_FLUSH:
		return VIRTIO_BLK_S_OK;
	default:
		return model_segments(m, type == T_DISCARD, out + 16, length);
	}
}

static void model_answer(struct model *m, const uint8_t *out, uint64_t out_len, const uint8_t *in, uint64_t in_len,
			 struct answer *a)
{
	memset(a, 0, sizeof(*a));
	memcpy(a->in, in, in_len);
	a->broken = out_len < 16 || in_len < 1;
	if (a->broken)
		return;
	a->written = 1;
	a->status = model_request(m, out, out_len, a, in_len - 1);
	a->in[in_len - 1] = a->status;
}

/* Cut up to `limit` bytes into pieces, each a heap block of its own. */
static uint32_t pieces_make(struct input *in, struct iovec *iov, uint64_t limit, uint64_t *total)
{
	uint32_t count = 0, wanted = (uint32_t)input_take(in, 1) % PIECES_MAX;

	*total = 0;
	while (count < wanted && *total < limit) {
		/* Odd: 1 to 128 bytes. Even: as many times 128 bytes, so that whole blocks are near. */
		uint64_t code = input_take(in, 1), n = code & 1 ? (code >> 1) + 1 : (code + 2) << 7;

		if (n > limit - *total)
			n = limit - *total;
		iov[count] = (struct iovec){ malloc(n), n };
		CHECK(iov[count].iov_base);
		*total += n;
		count++;
	}
	return count;
}

static void pieces_copy(const struct iovec *iov, uint32_t count, uint8_t *flat, bool from_flat)
{
	for (uint32_t i = 0; i < count; i++) {
		memcpy(from_flat ? iov[i].iov_base : flat, from_flat ? flat : iov[i].iov_base, iov[i].iov_len);
		flat += iov[i].iov_len;
	}
}

static void request(struct native_device *device, struct virtqueue *vq, struct model *m, struct input *in)
{
	static uint8_t out[BUFFER_BYTES], in_bytes[BUFFER_BYTES], after[BUFFER_BYTES];
	static struct answer expected;
	struct iovec pieces[2 * PIECES_MAX], kept[2 * PIECES_MAX];
	struct chain_view chain = { .iov = pieces, .slots = 1 };
	uint64_t errors = 0, op_errors = 0;
	uint32_t total;
	int64_t written;

	chain.readable_count = pieces_make(in, pieces, BUFFER_BYTES, &chain.readable_len);
	chain.writable_count = pieces_make(in, pieces + chain.readable_count, BUFFER_BYTES, &chain.writable_len);
	total = chain.readable_count + chain.writable_count;
	for (uint64_t i = 0; i < chain.readable_len; i++) /* the data repeats what the input gives */
		out[i] = in->left ? (uint8_t)input_take(in, 1) : (uint8_t)(i * 7 + out[i / 2]);
	memset(in_bytes, 0xc3, chain.writable_len);
	pieces_copy(pieces, chain.readable_count, out, true);
	pieces_copy(pieces + chain.readable_count, chain.writable_count, in_bytes, true);
	memcpy(kept, pieces, sizeof(kept)); /* the device may eat its copy from the front */
	model_answer(m, out, chain.readable_len, in_bytes, chain.writable_len, &expected);

	for (int i = 0; i < DP_QUEUE_OPS; i++)
		errors += vq->stats.ops[i].errors;
	written = device->ops->serve(device, NULL, vq, &chain, now_ns());
	for (int i = 0; i < DP_QUEUE_OPS; i++)
		op_errors += vq->stats.ops[i].errors;

	CHECK(expected.broken == (written == SERVE_BROKEN));
	CHECK(expected.broken == (vq->fault == VQ_FAULT_SHAPE));
	if (!expected.broken) {
		CHECK(written == expected.written);
		CHECK(op_errors - errors == (expected.status != VIRTIO_BLK_S_OK));
	}
	vq->fault = VQ_FAULT_NONE;
	pieces_copy(kept, chain.readable_count, after, false);
	CHECK(memcmp(after, out, chain.readable_len) == 0); /* device-readable bytes are only read (2.7.5) */
	pieces_copy(kept + chain.readable_count, chain.writable_count, after, false);
	CHECK(memcmp(after, expected.in, chain.writable_len) == 0);
	CHECK(memcmp(((struct blk_device *)device)->memory, m->disk, DISK_BYTES) == 0);
	while (total--)
		free(kept[total].iov_base);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct model m;
	struct input in = { data, size };
	struct blk_setup setup = { .capacity = DISK_BYTES / 512, .fd = -1, .news_fd = -1, .backend = BLK_BACKEND_MEMORY,
				   .max_discard_sectors = MAX_DISCARD, .max_write_zeroes_sectors = MAX_ZEROES };
	struct native_device *device;
	struct virtqueue *vq = virtqueue_new(0, -1);
	int error;

	memset(&m, 0, sizeof(m));
	m.flags = (uint8_t)input_take(&in, 1);
	m.block = setup.block_size = m.flags & BLOCK_1024 ? 1024 : 512;
	m.capacity = setup.capacity;
	setup.read_only = m.flags & READ_ONLY;
	setup.discard = m.flags & DISCARD;
	setup.write_zeroes = m.flags & WRITE_ZEROES;
	memcpy(setup.serial, SERIAL, sizeof(setup.serial));
	device = blk_new(&setup, &error);
	CHECK(device && vq);
	if (m.flags & SHRUNK) {
		m.capacity = 7;
		blk_set_capacity(device, m.capacity);
	}
	while (in.left)
		request(device, vq, &m, &in);
	native_device_unref(device);
	virtqueue_free(vq);
	return 0;
}
