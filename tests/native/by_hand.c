/* Workers whose rounds a test makes by hand, and disks to put on them. */
#include "by_hand.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---- the reactor ---- */

static int note_open(struct worker *w)
{
	(void)w;
	return 0;
}

static void note_close(struct worker *w)
{
	(void)w;
}

static int note_add_doorbell(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	(void)w, (void)vq, (void)kind;
	return 0;
}

static void note_remove_doorbell(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	worker_doorbell_removed(w, vq, kind);
}

static int note_add_source(struct worker *w, struct source *source)
{
	(void)w;
	source_rang(source, POLLOUT);
	return 0;
}

static void note_remove_source(struct worker *w, struct source *source)
{
	source_removed(w, source);
}

static void note_submit(struct worker *w, struct request *r)
{
	CHECK(w->state->count < ARRAY_SIZE(w->state->given));
	w->state->given[w->state->count++] = r;
	for (uint32_t i = 0; i < r->io_count; i++)
		w->state->bytes += r->io_iov[i].iov_len;
}

static bool note_turn(struct worker *w, uint64_t timeout_ns)
{
	(void)w, (void)timeout_ns;
	return false;
}

static const struct reactor_ops note_ops = {
	.open = note_open,
	.close = note_close,
	.add_doorbell = note_add_doorbell,
	.remove_doorbell = note_remove_doorbell,
	.add_source = note_add_source,
	.remove_source = note_remove_source,
	.submit = note_submit,
	.turn = note_turn,
};

static ssize_t perform(const struct request *r)
{
	switch (r->io) {
	case IO_READ:
		return preadv(r->fd, r->io_iov, (int)r->io_count, (off_t)r->offset);
	case IO_WRITE:
		return pwritev2(r->fd, r->io_iov, (int)r->io_count, (off_t)r->offset, r->flags);
	case IO_FSYNC:
		return fdatasync(r->fd);
	case IO_FALLOCATE:
		return fallocate(r->fd, r->flags, (off_t)r->offset, (off_t)r->length);
	}
	return -1;
}

void answer_failing(struct worker *w, uint32_t kinds, int error)
{
	struct reactor_state now = *w->state;

	*w->state = (struct reactor_state){ 0 };
	for (uint32_t i = 0; i < now.count; i++) {
		struct request *r = now.given[i];
		bool fails = kinds >> r->io & 1;
		ssize_t result = fails ? -error : perform(r);

		CHECK(result >= 0 || fails);
		r->device->ops->io_done(r, (int)result);
	}
}

void answer(struct worker *w)
{
	answer_failing(w, 0, 0);
}

/* ---- worker, queues, disks ---- */

void command(struct table *t, uint32_t op, uint32_t queue)
{
	struct worker_command c = { .op = op, .vq = t->queues[queue], .device = t->disks[queue], .fd = -1 };
	uint32_t rounds = 0;

	worker_post(&t->worker, &c);
	while (!worker_take_done(&t->worker)) {
		worker_round(&t->worker);
		CHECK(++rounds < 1000);
	}
	CHECK(c.result == 0);
}

struct blk_setup disk_setup(enum disk_kind kind)
{
	return (struct blk_setup){
		.capacity = DISK_SIZE >> 9,
		.fd = -1,
		.cached_fd = -1,
		.news_fd = -1,
		.backend = kind == DISK_MEMORY ? BLK_BACKEND_MEMORY : BLK_BACKEND_FILE,
		.inline_io = kind == DISK_TMPFS,
		.direct = kind == DISK_DIRECT,
		.block_size = 512,
		.memory_align = 512,
		.offset_align = 512,
		.erase_align = 1,
		.write_zeroes = 1,
		.max_write_zeroes_sectors = DISK_SIZE >> 9,
	};
}

static void open_disk(struct table *t, uint32_t i, struct blk_setup setup)
{
	struct queue_setup ring;
	int error;

	if (setup.backend != BLK_BACKEND_MEMORY) {
		setup.fd = memfd_create("disk", MFD_CLOEXEC);
		CHECK(setup.fd >= 0 && ftruncate(setup.fd, DISK_SIZE) == 0);
		if (setup.offset_align > setup.block_size)
			setup.cached_fd = setup.fd;
	}
	t->disks[i] = blk_new(&setup, &error);
	CHECK(t->disks[i]);
	t->fds[i] = setup.fd;
	driver_init(&t->drivers[i], t->guest, area(i), false, false);
	t->queues[i] = virtqueue_new(i, t->worker.done_fd);
	ring = driver_setup(&t->drivers[i]);
	CHECK(virtqueue_configure(t->queues[i], &ring, t->guest->table, NULL) == 0);
	command(t, WORKER_ATTACH, i);
}

static void open_all(struct table *t, const struct reactor_ops *reactor, const struct blk_setup setups[QUEUES],
		     uint64_t turn_ns)
{
	memset(t, 0, sizeof(*t));
	t->guest = guest_new((uint64_t)QUEUES * AREA, false);
	t->worker.state = &t->reactor;
	t->worker.reactor = reactor;
	t->worker.turn_ns = turn_ns;
	t->most = setups[0].direct ? BLK_PART_DIRECT : 2 * BLK_PART;
	t->worker.wake_fd = t->worker.done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	CHECK(reactor->open(&t->worker) == 0);
	for (uint32_t i = 0; i < QUEUES; i++)
		open_disk(t, i, setups[i]);
}

void table_open_on(struct table *t, const struct reactor_ops *reactor, const struct blk_setup setups[QUEUES])
{
	open_all(t, reactor, setups, UINT64_MAX);
}

void table_open_disks(struct table *t, const struct blk_setup setups[QUEUES], uint64_t turn_ns)
{
	open_all(t, &note_ops, setups, turn_ns);
}

void table_open(struct table *t, enum disk_kind greedy, uint64_t turn_ns)
{
	table_open_disks(t, (struct blk_setup[]){ disk_setup(greedy), disk_setup(DISK_MEMORY) }, turn_ns);
}

void table_close(struct table *t)
{
	for (uint32_t i = 0; i < QUEUES; i++) {
		if (t->queues[i]->device && !t->queues[i]->inflight) { /* every request went back */
			uint32_t back = 0;

			for (struct request *r = t->queues[i]->free_requests; r; r = r->next)
				back++;
			CHECK(back == t->queues[i]->pool_used);
		}
		if (t->queues[i]->device)
			command(t, WORKER_DETACH, i);
		CHECK(!t->queues[i]->pool);
		virtqueue_free(t->queues[i]);
		native_device_unref(t->disks[i]);
		if (t->fds[i] >= 0)
			close(t->fds[i]);
	}
	CHECK(!t->worker.parts);
	t->worker.reactor->close(&t->worker);
	close(t->worker.done_fd);
	guest_free(t->guest);
}

/* ---- the driver ---- */

void ask_at(struct table *t, uint32_t queue, uint32_t tag, uint32_t type, uint32_t sector, uint32_t bytes)
{
	uint64_t header = area(queue) + DRIVER_AREA + tag * 64;
	struct piece pieces[DRIVER_PIECES] = { { header, 16, false } };
	uint32_t *words = guest_at(t->guest, header), count = 1;

	words[0] = type;
	words[1] = words[3] = 0;
	words[2] = sector;
	*(uint8_t *)guest_at(t->guest, header + 48) = 0xaa;
	if (type == T_WRITE_ZEROES || type == T_DISCARD) {
		words[2] = 0;
		words[4] = sector;
		words[5] = words[7] = 0;
		words[6] = bytes >> 9;
		pieces[count++] = (struct piece){ header + 16, 16, false };
		bytes = 0;
	}
	for (; bytes; count++) {
		uint32_t n = bytes < 4 * MIB ? bytes : 4 * MIB;

		CHECK(count < DRIVER_PIECES - 1);
		pieces[count] = (struct piece){ area(queue) + DATA_AT, n, type == T_IN };
		bytes -= n;
	}
	pieces[count++] = (struct piece){ header + 48, 1, true };
	driver_add(&t->drivers[queue], tag, pieces, count, false);
}

void ask(struct table *t, uint32_t queue, uint32_t tag, uint32_t type, uint32_t bytes)
{
	ask_at(t, queue, tag, type, 0, bytes);
}

uint8_t status(struct table *t, uint32_t queue, uint32_t tag)
{
	return *(uint8_t *)guest_at(t->guest, area(queue) + DRIVER_AREA + tag * 64 + 48);
}

uint32_t collect(struct table *t, uint32_t queue)
{
	uint32_t tag, written, count = 0;

	for (; driver_used(&t->drivers[queue], &tag, &written); count++)
		CHECK(status(t, queue, tag) == 0);
	return count;
}

uint32_t rounds_until(struct table *t, uint32_t greedy, bool answering)
{
	uint32_t rounds = 0, back = 0;

	while (back < greedy) {
		ask(t, 1, 0, T_IN, 4096);
		worker_round(&t->worker);
		CHECK(collect(t, 1) == 1);
		CHECK(t->reactor.bytes <= t->most);
		if (answering)
			answer(&t->worker);
		back += collect(t, 0);
		CHECK(++rounds < 1000);
	}
	return rounds;
}
