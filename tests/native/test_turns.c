/*
 * What a queue may do before the next queue of its worker has its turn, in rounds and bytes: the worker goes round by
 * hand, on this thread, and its reactor only notes what it is given.
 */
#include "load.h"
#include "blk/blk.h"
#include "net/net.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define AREA (DRIVER_AREA + (8u << 20)) /* of a queue: rings, then 4 KiB of headers, then data */
#define DATA_AT (DRIVER_AREA + 0x1000u)
#define DISK_SIZE (64u << 20)
#define MIB (1u << 20)
#define QUEUES 2

enum { T_IN = 0, T_OUT = 1, T_WRITE_ZEROES = 13 };

struct reactor_state { /* what came to the reactor and was not answered */
	struct request *given[64];
	uint32_t count;
	uint64_t bytes; /* of them */
};

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
	return r->io == IO_READ ? preadv(r->fd, r->io_iov, (int)r->io_count, (off_t)r->offset)
				: pwritev(r->fd, r->io_iov, (int)r->io_count, (off_t)r->offset);
}

/* Do what the reactor was given until now, and say so to the device. */
static void answer(struct worker *w)
{
	struct reactor_state now = *w->state;

	*w->state = (struct reactor_state){ 0 };
	for (uint32_t i = 0; i < now.count; i++)
		now.given[i]->device->ops->io_done(now.given[i], (int)perform(now.given[i]));
}

/* ---- a worker with two queues: the first one's driver is greedy ---- */

struct table {
	struct guest *guest;
	struct worker worker;
	struct reactor_state reactor;
	struct native_device *disks[QUEUES];
	struct virtqueue *queues[QUEUES];
	struct driver drivers[QUEUES];
	int fds[QUEUES];
	uint64_t most; /* that comes to the reactor in a round: what begins, and what goes on */
};

static uint64_t area(uint32_t queue)
{
	return GUEST_GPA + (uint64_t)queue * AREA;
}

static void command(struct table *t, uint32_t op, uint32_t queue)
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

static void table_open(struct table *t, enum disk_kind greedy, uint64_t turn_ns)
{
	memset(t, 0, sizeof(*t));
	t->guest = guest_new((uint64_t)QUEUES * AREA, false);
	t->worker.reactor = &note_ops;
	t->worker.state = &t->reactor;
	t->worker.turn_ns = turn_ns;
	t->most = greedy == DISK_DIRECT ? BLK_PART_DIRECT : 2 * BLK_PART;
	t->worker.wake_fd = t->worker.done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	for (uint32_t i = 0; i < QUEUES; i++) {
		enum disk_kind kind = i ? DISK_MEMORY : greedy;
		struct blk_setup setup = { .capacity = DISK_SIZE >> 9, .fd = -1, .cached_fd = -1, .news_fd = -1,
					   .block_size = 512, .memory_align = 512, .offset_align = 512, .erase_align = 1,
					   .write_zeroes = 1, .max_write_zeroes_sectors = DISK_SIZE >> 9 };
		struct queue_setup ring;
		int error;

		setup.backend = kind == DISK_MEMORY ? BLK_BACKEND_MEMORY : BLK_BACKEND_FILE;
		setup.inline_io = kind == DISK_TMPFS;
		setup.direct = kind == DISK_DIRECT;
		if (kind != DISK_MEMORY) {
			setup.fd = memfd_create("disk", MFD_CLOEXEC);
			CHECK(setup.fd >= 0 && ftruncate(setup.fd, DISK_SIZE) == 0);
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
}

static void table_close(struct table *t)
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
	close(t->worker.done_fd);
	guest_free(t->guest);
}

/* A request of `mib` MiB: 4 MiB of guest memory, again and again. The answer goes to the byte behind its header. */
static void ask(struct table *t, uint32_t queue, uint32_t tag, uint32_t type, uint32_t bytes)
{
	uint64_t header = area(queue) + DRIVER_AREA + tag * 64;
	struct piece pieces[DRIVER_PIECES] = { { header, 16, false } };
	uint32_t *words = guest_at(t->guest, header), count = 1;

	words[0] = type;
	words[1] = words[2] = words[3] = 0;
	*(uint8_t *)guest_at(t->guest, header + 48) = 0xaa;
	if (type == T_WRITE_ZEROES) {
		words[4] = words[5] = words[7] = 0;
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

static uint8_t status(struct table *t, uint32_t queue, uint32_t tag)
{
	return *(uint8_t *)guest_at(t->guest, area(queue) + DRIVER_AREA + tag * 64 + 48);
}

static uint32_t collect(struct table *t, uint32_t queue)
{
	uint32_t tag, written, count = 0;

	for (; driver_used(&t->drivers[queue], &tag, &written); count++)
		CHECK(status(t, queue, tag) == 0);
	return count;
}

/* In each round the other queue has its turn, whatever the greedy one has asked for: how many rounds that takes. */
static uint32_t rounds_until(struct table *t, uint32_t greedy, bool answering)
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

static void test_a_request_of_many_mib_takes_as_many_turns_and_the_neighbour_has_one_after_each(enum disk_kind kind,
												uint32_t type)
{
	struct table t;

	table_open(&t, kind, UINT64_MAX);
	for (uint32_t tag = 0; tag < 4; tag++)
		ask(&t, 0, tag, type, 20 * MIB);
	/* Where the kernel copies, the first part of one request and a further one of another may come in one round. */
	CHECK(rounds_until(&t, 4, kind == DISK_TMPFS_ASYNC) >= 4 * 20 - 4);
	table_close(&t);
}

/* A pattern goes through all the parts: each byte is where it belongs. */
static void test_a_request_in_parts_moves_every_byte_once(enum disk_kind kind)
{
	struct table t;
	uint32_t *data;

	table_open(&t, kind, UINT64_MAX);
	data = guest_at(t.guest, area(0) + DATA_AT);
	for (uint32_t i = 0; i < MIB; i++)
		data[i] = i * 2654435761u;
	ask(&t, 0, 0, T_OUT, 4 * MIB - 512);
	rounds_until(&t, 1, kind != DISK_MEMORY && kind != DISK_TMPFS);
	memset(data, 0, 4 * MIB);
	ask(&t, 0, 0, T_IN, 4 * MIB - 512);
	rounds_until(&t, 1, kind != DISK_MEMORY && kind != DISK_TMPFS);
	for (uint32_t i = 0; i < MIB - 128; i++)
		CHECK(data[i] == i * 2654435761u);
	for (uint32_t i = MIB - 128; i < MIB; i++)
		CHECK(data[i] == 0);
	CHECK(load_relaxed(&virtqueue_stats(t.queues[0])->ops[BLK_OP_READ].bytes) == 4 * MIB - 512);
	table_close(&t);
}

static void test_zeroes_are_written_in_parts_and_all_of_them(enum disk_kind kind)
{
	struct table t;
	uint32_t *data, rounds;

	table_open(&t, kind, 0);
	data = guest_at(t.guest, area(0) + DATA_AT);
	memset(data, 0xee, 4 * MIB);
	ask(&t, 0, 0, T_OUT, 20 * MIB);
	rounds_until(&t, 1, false);
	ask(&t, 0, 0, T_WRITE_ZEROES, 20 * MIB - 512);
	rounds = rounds_until(&t, 1, false);
	CHECK(rounds >= 20 && rounds <= 22);
	for (uint32_t mib = 0; mib < 20; mib += 4) {
		uint32_t *header;

		ask(&t, 0, 0, T_IN, 4 * MIB);
		header = guest_at(t.guest, area(0) + DRIVER_AREA);
		header[2] = mib << 11;
		rounds_until(&t, 1, false);
		for (uint32_t i = 0; i < MIB; i++)
			CHECK(data[i] == (mib == 16 && i >= MIB - 128 ? 0xeeeeeeee : 0));
	}
	table_close(&t);
}

static void test_a_turn_ends_when_its_time_is_over(void)
{
	struct table t;

	table_open(&t, DISK_MEMORY, 0);
	for (uint32_t tag = 0; tag < 20; tag++)
		ask(&t, 0, tag, T_IN, 4096);
	CHECK(rounds_until(&t, 20, false) == 20); /* no time at all: a chain a turn */
	t.worker.turn_ns = UINT64_MAX;
	for (uint32_t tag = 0; tag < 20; tag++)
		ask(&t, 0, tag, T_IN, 4096);
	CHECK(rounds_until(&t, 20, false) == 1);
	table_close(&t);
}

static void test_what_is_handed_to_the_kernel_to_copy_is_bounded_as_well(void)
{
	struct table t;

	table_open(&t, DISK_TMPFS_ASYNC, UINT64_MAX);
	for (uint32_t tag = 0; tag < 20; tag++)
		ask(&t, 0, tag, T_OUT, MIB / 4);
	CHECK(rounds_until(&t, 20, true) == 5 + 1); /* the answers to the last ones are published in another round */
	/* The disk's own DMA copies nothing: one round begins them all, each with as much as is pinned at once. */
	table_close(&t);
	table_open(&t, DISK_DIRECT, UINT64_MAX);
	for (uint32_t tag = 0; tag < 4; tag++)
		ask(&t, 0, tag, T_OUT, 20 * MIB);
	worker_round(&t.worker);
	CHECK(t.reactor.count == 4 && t.reactor.bytes == 16 * MIB);
	for (uint32_t i = 0; i < 5; i++)
		answer(&t.worker);
	worker_round(&t.worker);
	CHECK(collect(&t, 0) == 4);
	table_close(&t);
}

static void test_a_stop_in_the_middle_of_a_long_request_waits_for_its_end(void)
{
	struct worker_command detach = { .op = WORKER_DETACH, .fd = -1 };
	struct table t;
	uint32_t rounds = 0;

	table_open(&t, DISK_MEMORY, UINT64_MAX);
	ask(&t, 0, 0, T_OUT, 20 * MIB);
	ask(&t, 0, 1, T_OUT, 20 * MIB);
	for (int i = 0; i < 3; i++)
		worker_round(&t.worker);
	detach.vq = t.queues[0];
	worker_post(&t.worker, &detach);
	while (!worker_take_done(&t.worker)) {
		worker_round(&t.worker);
		CHECK(++rounds < 30);
	}
	CHECK(detach.result == 0 && collect(&t, 0) == 1); /* the second one was never begun */
	CHECK(virtqueue_base(t.queues[0]) == 1);
	table_close(&t);
}

static void test_a_queue_that_breaks_in_the_middle_of_a_long_request_does_no_more_of_it(void)
{
	struct table t;

	table_open(&t, DISK_MEMORY, UINT64_MAX);
	ask(&t, 0, 0, T_OUT, 20 * MIB);
	worker_round(&t.worker);
	CHECK(t.queues[0]->unfinished);
	virtqueue_break(t.queues[0], VQ_FAULT_DEVICE, 0, 0, 0);
	worker_round(&t.worker);
	CHECK(!t.queues[0]->unfinished && collect(&t, 0) == 0);
	table_close(&t);
}

/* ---- frames ---- */

static struct native_device *nic_new(uint32_t backend, int fd)
{
	struct net_setup setup = { .backend = backend, .pairs = 1, .fds = { fd }, .mac = { 2, 0, 0, 0, 0, 1 } };
	struct native_device *nic;
	int error;

	nic = net_new(&setup, NULL, &error);
	CHECK(nic);
	net_set_features(nic, 1ull << VIRTIO_F_VERSION_1);
	return nic;
}

/* The first queue is now the transmit queue of `nic`. */
static void become_nic(struct table *t, struct native_device *nic)
{
	struct queue_setup ring = driver_setup(&t->drivers[0]);

	command(t, WORKER_DETACH, 0);
	virtqueue_free(t->queues[0]);
	native_device_unref(t->disks[0]);
	t->disks[0] = nic;
	t->queues[0] = virtqueue_new(1, t->worker.done_fd);
	CHECK(virtqueue_configure(t->queues[0], &ring, t->guest->table, NULL) == 0);
	command(t, WORKER_ATTACH, 0);
}

static void send_frames(struct table *t, uint32_t count, uint32_t bytes)
{
	for (uint32_t tag = 0; tag < count; tag++) {
		struct piece piece = { area(0) + DATA_AT, NET_HEADER_SIZE + bytes, false };

		memset(guest_at(t->guest, piece.gpa), 0, NET_HEADER_SIZE);
		*(uint8_t *)guest_at(t->guest, area(0) + DRIVER_AREA + tag * 64 + 48) = 0; /* collect's */
		driver_add(&t->drivers[0], tag, &piece, 1, false);
	}
}

static void test_a_turn_of_frames_ends_by_their_bytes(void)
{
	struct table t;

	table_open(&t, DISK_MEMORY, UINT64_MAX);
	become_nic(&t, nic_new(NET_BACKEND_REFLECT, -1));
	send_frames(&t, 32, 65000);
	CHECK(rounds_until(&t, 32, false) == 2);
	send_frames(&t, 32, 60);
	CHECK(rounds_until(&t, 32, false) == 1);
	table_close(&t);
}

static void test_a_turn_of_frames_through_a_descriptor_ends_by_the_clock(void)
{
	struct table t;
	uint8_t frame[128];
	int ends[2];

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
	table_open(&t, DISK_MEMORY, 0);
	become_nic(&t, nic_new(NET_BACKEND_DATAGRAM, ends[0]));
	send_frames(&t, 32, 60);
	CHECK(rounds_until(&t, 32, false) == 2);
	for (uint32_t i = 0; i < 32; i++)
		CHECK(recv(ends[1], frame, sizeof(frame), 0) == 60);
	table_close(&t);
	close(ends[0]);
	close(ends[1]);
}

int main(void)
{
	static const enum disk_kind copied[] = { DISK_MEMORY, DISK_TMPFS, DISK_TMPFS_ASYNC };

	alarm(100);
	for (uint32_t i = 0; i < ARRAY_SIZE(copied); i++) {
		test_a_request_of_many_mib_takes_as_many_turns_and_the_neighbour_has_one_after_each(copied[i], T_IN);
		test_a_request_of_many_mib_takes_as_many_turns_and_the_neighbour_has_one_after_each(copied[i], T_OUT);
		test_a_request_in_parts_moves_every_byte_once(copied[i]);
	}
	test_a_request_in_parts_moves_every_byte_once(DISK_DIRECT);
	test_zeroes_are_written_in_parts_and_all_of_them(DISK_MEMORY);
	test_zeroes_are_written_in_parts_and_all_of_them(DISK_TMPFS);
	test_a_turn_ends_when_its_time_is_over();
	test_what_is_handed_to_the_kernel_to_copy_is_bounded_as_well();
	test_a_stop_in_the_middle_of_a_long_request_waits_for_its_end();
	test_a_queue_that_breaks_in_the_middle_of_a_long_request_does_no_more_of_it();
	test_a_turn_of_frames_ends_by_their_bytes();
	test_a_turn_of_frames_through_a_descriptor_ends_by_the_clock();
	return 0;
}
