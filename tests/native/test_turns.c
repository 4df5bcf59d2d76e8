/* What a disk's queue may do before the next queue of its worker has its turn, in rounds and bytes. */
#include "by_hand.h"

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

static void test_a_round_hands_over_so_many_requests_and_one_of_each_queue_at_least(void)
{
	struct blk_setup direct = disk_setup(DISK_DIRECT);
	uint32_t greedy;
	struct table t;

	table_open_disks(&t, (struct blk_setup[]){ direct, direct }, UINT64_MAX);
	for (uint32_t tag = 0; tag < DRIVER_TAGS; tag++) {
		ask(&t, 0, tag, T_IN, 4096);
		ask(&t, 1, tag, T_IN, 4096);
	}
	worker_round(&t.worker);
	CHECK(t.reactor.count == WORKER_ROUND_STARTS + 1);
	greedy = t.queues[1]->inflight == 1 ? 0 : 1;
	CHECK(t.queues[greedy]->inflight == WORKER_ROUND_STARTS);
	answer(&t.worker);
	worker_publish_touched(&t.worker);
	CHECK(collect(&t, greedy) == DRIVER_TAGS);
	for (uint32_t tag = 0; tag < DRIVER_TAGS; tag++)
		ask(&t, greedy, tag, T_IN, 4096);
	worker_round(&t.worker); /* which begins with the other one */
	CHECK(t.queues[!greedy]->inflight == DRIVER_TAGS - 1);
	for (uint32_t rounds = 0; rounds < 3; rounds++) {
		worker_round(&t.worker);
		answer(&t.worker);
	}
	worker_round(&t.worker);
	CHECK(collect(&t, 0) == DRIVER_TAGS && collect(&t, 1) == DRIVER_TAGS);
	table_close(&t);
}

/* A disk that hangs holds so many requests, and so many threads, and no more. */
static void test_the_queues_of_a_disk_share_the_requests_that_it_may_have(void)
{
	struct blk_setup direct = disk_setup(DISK_DIRECT);
	struct table t;

	direct.queues = DEVICE_REQUESTS / 16;
	table_open_disks(&t, (struct blk_setup[]){ direct, disk_setup(DISK_MEMORY) }, UINT64_MAX);
	for (uint32_t tag = 0; tag < DRIVER_TAGS; tag++)
		ask(&t, 0, tag, T_IN, 4096);
	for (uint32_t rounds = 0; rounds < 3; rounds++)
		worker_round(&t.worker);
	CHECK(t.reactor.count == 16);
	answer(&t.worker);
	worker_round(&t.worker);
	CHECK(t.reactor.count == 16);
	answer(&t.worker);
	worker_round(&t.worker);
	CHECK(collect(&t, 0) == DRIVER_TAGS);
	table_close(&t);
}

/* A quarter of a MiB that direct I/O does not take as it lies there. */
static void ask_unaligned(struct table *t, uint32_t tag, uint32_t type)
{
	uint64_t header = area(0) + DRIVER_AREA + tag * 64;
	struct piece pieces[] = { { header, 16, false },
				  { area(0) + DATA_AT + 512, MIB / 4, type == T_IN },
				  { header + 48, 1, true } };
	uint32_t *words = guest_at(t->guest, header);

	words[0] = type;
	words[1] = words[2] = words[3] = 0;
	driver_add(&t->drivers[0], tag, pieces, ARRAY_SIZE(pieces), false);
}

static void test_a_write_through_a_bounce_buffer_counts_what_is_copied(void)
{
	struct blk_setup direct = disk_setup(DISK_DIRECT);
	struct table t;

	direct.memory_align = 4096;
	table_open_disks(&t, (struct blk_setup[]){ direct, disk_setup(DISK_MEMORY) }, UINT64_MAX);
	for (uint32_t tag = 0; tag < 20; tag++)
		ask_unaligned(&t, tag, T_OUT);
	for (uint32_t rounds = 1; rounds <= 5; rounds++) {
		worker_round(&t.worker);
		CHECK(t.reactor.count == rounds * 4);
	}
	answer(&t.worker);
	worker_round(&t.worker);
	CHECK(collect(&t, 0) == 20);
	table_close(&t);
}

/* What the kernel has read for all of them at once is copied to the guest in several turns. */
static void test_a_read_through_a_bounce_buffer_counts_what_is_copied(const struct reactor_ops *reactor)
{
	struct blk_setup direct = disk_setup(DISK_DIRECT);
	struct table t;
	uint32_t back = 0;

	direct.memory_align = 4096;
	table_open_on(&t, reactor, (struct blk_setup[]){ direct, disk_setup(DISK_MEMORY) });
	for (uint32_t tag = 0; tag < 20; tag++)
		ask_unaligned(&t, tag, T_IN);
	while (back < 20) {
		uint32_t count;

		worker_round(&t.worker);
		count = collect(&t, 0);
		CHECK(count <= 4);
		back += count;
	}
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
	test_a_round_hands_over_so_many_requests_and_one_of_each_queue_at_least();
	test_the_queues_of_a_disk_share_the_requests_that_it_may_have();
	test_a_write_through_a_bounce_buffer_counts_what_is_copied();
	test_a_read_through_a_bounce_buffer_counts_what_is_copied(&uring_ops);
	test_a_read_through_a_bounce_buffer_counts_what_is_copied(&epoll_ops);
	return 0;
}
