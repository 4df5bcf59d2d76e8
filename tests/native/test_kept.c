/*
 * Disks with on_error = "stop" (blk/kept.c) in their rarer ways: writes that are durable before they are answered, and
 * blocks of the host's that hold several of the guest's, where requests wait for one that is kept.
 */
#include "by_hand.h"

#include <unistd.h>

#define HOST_BLOCK 4096

static void open_stopping(struct table *t, bool shared_blocks)
{
	struct blk_setup setup = disk_setup(DISK_DIRECT);

	setup.stop_on_error = 1;
	if (shared_blocks)
		setup.offset_align = setup.memory_align = HOST_BLOCK;
	setup.discard = 1;
	setup.max_discard_sectors = DISK_SIZE >> 9;
	table_open_disks(t, (struct blk_setup[]){ setup, disk_setup(DISK_MEMORY) }, UINT64_MAX);
}

static const struct blk_errors *errors(struct table *t)
{
	return blk_errors(t->disks[0]);
}

/* Rounds, with every I/O done, until nothing of the first disk is left to do. */
static void settle(struct table *t)
{
	for (uint32_t rounds = 0; rounds < 20; rounds++) {
		worker_round(&t->worker);
		answer(&t->worker);
	}
}

static void fail_next(struct table *t, enum io_kind io, int error)
{
	worker_round(&t->worker);
	answer_failing(&t->worker, 1u << io, error);
	worker_round(&t->worker);
}

static void fill(struct table *t, uint8_t value)
{
	memset(guest_at(t->guest, area(0) + DATA_AT), value, HOST_BLOCK);
}

static uint8_t byte_at(struct table *t, uint64_t offset)
{
	uint8_t byte;

	CHECK(pread(t->fds[0], &byte, 1, (off_t)offset) == 1);
	return byte;
}

/* No room is no lost data: what is tried again is durable, and so are flushes. */
static void test_a_durable_write_that_found_no_room_is_kept_and_flushes_go_on(void)
{
	struct table t;

	open_stopping(&t, false);
	blk_set_writeback(t.disks[0], 0);
	fill(&t, 7);
	ask(&t, 0, 0, T_OUT, 4096);
	worker_round(&t.worker);
	CHECK(t.reactor.count == 1 && t.reactor.given[0]->flags == RWF_DSYNC);
	answer_failing(&t.worker, 1u << IO_WRITE, ENOSPC);
	worker_round(&t.worker);
	CHECK(collect(&t, 0) == 0 && errors(&t)->stopped && errors(&t)->kept == 1 && !errors(&t)->sync_error);
	blk_retry(t.disks[0]);
	worker_round(&t.worker);
	CHECK(t.reactor.count == 1 && t.reactor.given[0]->flags == RWF_DSYNC);
	settle(&t);
	CHECK(collect(&t, 0) == 1 && !errors(&t)->stopped && byte_at(&t, 0) == 7);
	ask(&t, 0, 0, T_FLUSH, 0);
	settle(&t);
	CHECK(collect(&t, 0) == 1);
	table_close(&t);
}

/* It may have been the write-back of other data that failed: no flush succeeds until the image is reopened. */
static void test_a_durable_write_that_the_storage_failed_is_kept_and_flushes_fail(void)
{
	struct table t;

	open_stopping(&t, false);
	blk_set_writeback(t.disks[0], 0);
	ask(&t, 0, 0, T_OUT, 4096);
	fail_next(&t, IO_WRITE, EIO);
	CHECK(collect(&t, 0) == 0 && errors(&t)->kept == 1 && errors(&t)->sync_error == EIO);
	blk_retry(t.disks[0]);
	settle(&t);
	CHECK(collect(&t, 0) == 1 && !errors(&t)->stopped);
	ask(&t, 0, 0, T_FLUSH, 0);
	settle(&t);
	CHECK(status(&t, 0, 0) == 1 && errors(&t)->sync_error == EIO && !errors(&t)->stopped);
	table_close(&t);
}

/* Three sectors of one block of the host's: the first write is kept with the block, the others wait for it. */
static void write_three(struct table *t, enum io_kind fails)
{
	fill(t, 3);
	for (uint32_t tag = 0; tag < 3; tag++)
		ask_at(t, 0, tag, T_OUT, tag, 512);
	worker_round(&t->worker);
	CHECK(t->reactor.count == 1);
	if (fails == IO_WRITE) {
		answer(&t->worker); /* the block around the sector is read */
		CHECK(t->reactor.count == 1);
	}
	answer_failing(&t->worker, 1u << fails, EIO);
	worker_round(&t->worker);
	CHECK(collect(t, 0) == 0 && errors(t)->stopped && errors(t)->kept == 1);
}

static void test_a_write_of_a_part_of_a_block_is_kept_with_the_block(enum io_kind fails)
{
	struct table t;

	open_stopping(&t, true);
	write_three(&t, fails);
	settle(&t);
	CHECK(collect(&t, 0) == 0 && byte_at(&t, 512) == 0); /* the others would write a block that is being changed */
	blk_retry(t.disks[0]);
	settle(&t);
	CHECK(collect(&t, 0) == 3 && !errors(&t)->stopped && !errors(&t)->kept);
	for (uint32_t sector = 0; sector < 3; sector++)
		CHECK(byte_at(&t, sector * 512) == 3 && byte_at(&t, sector * 512 + 511) == 3);
	CHECK(byte_at(&t, 3 * 512) == 0);
	table_close(&t);
}

/* A driver finds all of them in its ring again, as if they had never been taken. */
static void test_a_queue_stops_whose_requests_wait_for_one_that_is_kept(enum io_kind fails)
{
	struct table t;

	open_stopping(&t, true);
	write_three(&t, fails);
	command(&t, WORKER_DETACH, 0);
	CHECK(collect(&t, 0) == 0 && virtqueue_base(t.queues[0]) == 0 && !errors(&t)->kept);
	command(&t, WORKER_ATTACH, 0);
	blk_retry(t.disks[0]);
	settle(&t);
	CHECK(collect(&t, 0) == 3 && byte_at(&t, 2 * 512) == 3);
	table_close(&t);
}

/* A discard of two blocks of the host's, one by one. */
static void discard_two(struct table *t, uint32_t tag, uint32_t first_sector, uint32_t second_sector)
{
	uint64_t header = area(0) + DRIVER_AREA + tag * 64;
	struct piece pieces[] = { { header, 16, false }, { header + 16, 32, false }, { header + 48, 1, true } };
	uint32_t words[] = { T_DISCARD, 0, 0, 0, first_sector, 0, 8, 0, second_sector, 0, 8, 0 };

	memcpy(guest_at(t->guest, header), words, sizeof(words));
	driver_add(&t->drivers[0], tag, pieces, ARRAY_SIZE(pieces), false);
}

/* It goes on to a block that another one is kept with, which must be tried again before it can end. */
static void test_a_request_that_waits_in_its_next_try_delays_no_other_try(void)
{
	struct table t;

	open_stopping(&t, true);
	blk_accept(t.disks[0], 1, 1, 0);
	discard_two(&t, 0, 64, 0);
	fill(&t, 9);
	ask_at(&t, 0, 1, T_OUT, 0, HOST_BLOCK);
	worker_round(&t.worker);
	CHECK(t.reactor.count == 2);
	answer_failing(&t.worker, ~0u, EIO);
	CHECK(errors(&t)->kept == 2);
	blk_retry(t.disks[0]);
	worker_round(&t.worker);
	CHECK(t.reactor.count == 2);
	answer_failing(&t.worker, 1u << IO_WRITE, EIO);
	worker_round(&t.worker);
	CHECK(errors(&t)->kept == 1 && t.reactor.count == 0);
	blk_retry(t.disks[0]);
	settle(&t);
	CHECK(collect(&t, 0) == 2 && !errors(&t)->stopped && byte_at(&t, 0) == 0);
	table_close(&t);
}

int main(void)
{
	alarm(100);
	test_a_durable_write_that_found_no_room_is_kept_and_flushes_go_on();
	test_a_durable_write_that_the_storage_failed_is_kept_and_flushes_fail();
	test_a_write_of_a_part_of_a_block_is_kept_with_the_block(IO_READ);
	test_a_write_of_a_part_of_a_block_is_kept_with_the_block(IO_WRITE);
	test_a_queue_stops_whose_requests_wait_for_one_that_is_kept(IO_READ);
	test_a_queue_stops_whose_requests_wait_for_one_that_is_kept(IO_WRITE);
	test_a_request_that_waits_in_its_next_try_delays_no_other_try();
	return 0;
}
