/*
 * diskcheck's stress: several threads, each with many random reads and writes in flight, every block checked.
 *
 * A block holds its sector numbers, the seed and a generation that grows with each write, so that a read
 * that finds another block's content, an older generation or a torn block is noticed, on the host too.
 */
#define _GNU_SOURCE
#include "diskcheck.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RUN_MAX 16 /* blocks of one request */
#define FLUSH_EVERY 64
#define DEPTH_MAX 128

struct slot {
	struct iocb iocb;
	char *buffer;
	uint64_t first; /* block, counted from the thread's first */
	unsigned int blocks;
	bool write;
	bool in_flight;
};

struct worker {
	pthread_t thread;
	const struct stress *stress;
	unsigned int index;
	uint64_t first_block; /* of the disk */
	uint64_t blocks;
	uint32_t *generation; /* of each block; what the disk holds or is being given */
	bool *busy;
	uint64_t random;
	struct slot slots[DEPTH_MAX];
	unsigned int in_flight;
	aio_context_t context;
	uint64_t reads, writes, flushes;
	bool failed;
};

static uint64_t worker_random(struct worker *worker)
{
	/* xorshift64: any start but zero will do. */
	worker->random ^= worker->random << 13;
	worker->random ^= worker->random >> 7;
	worker->random ^= worker->random << 17;
	return worker->random;
}

static void slot_fill(struct worker *worker, struct slot *slot)
{
	unsigned int i;

	for (i = 0; i < slot->blocks; i++)
		pattern_fill(slot->buffer + i * BLOCK_BYTES, BLOCK_BYTES,
			     (worker->first_block + slot->first + i) * (BLOCK_BYTES / SECTOR_BYTES),
			     worker->stress->seed, ++worker->generation[slot->first + i]);
}

static int slot_check(struct worker *worker, const struct slot *slot)
{
	unsigned int i;

	for (i = 0; i < slot->blocks; i++) {
		uint64_t block = worker->first_block + slot->first + i;
		uint32_t generation = worker->generation[slot->first + i];
		const char *content = slot->buffer + i * BLOCK_BYTES;
		uint64_t found[2];
		long differs = pattern_compare(content, BLOCK_BYTES, block * (BLOCK_BYTES / SECTOR_BYTES),
					       worker->stress->seed, generation);

		if (differs < 0)
			continue;
		memcpy(found, content + differs / SECTOR_BYTES * SECTOR_BYTES, sizeof(found));
		return result_error("block %llu differs at byte %ld: expected generation %u, found sector %llu generation %u",
				    (unsigned long long)block, differs, generation, (unsigned long long)found[0],
				    (unsigned int)found[1]);
	}
	return 0;
}

/* Choose a run of blocks that no request in flight touches. */
static bool slot_choose(struct worker *worker, struct slot *slot)
{
	unsigned int attempt, i;

	for (attempt = 0; attempt < 16; attempt++) {
		slot->blocks = 1 + (unsigned int)(worker_random(worker) % RUN_MAX);
		if (slot->blocks > worker->blocks)
			slot->blocks = (unsigned int)worker->blocks;
		slot->first = worker_random(worker) % (worker->blocks - slot->blocks + 1);
		for (i = 0; i < slot->blocks && !worker->busy[slot->first + i]; i++)
			;
		if (i == slot->blocks)
			return true;
	}
	return false;
}

static int slot_submit(struct worker *worker, struct slot *slot)
{
	struct iocb *list[1] = {&slot->iocb};

	memset(worker->busy + slot->first, true, slot->blocks);
	if (slot->write)
		slot_fill(worker, slot);
	slot->iocb = (struct iocb){
		.aio_data = (uint64_t)(uintptr_t)slot,
		.aio_lio_opcode = slot->write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
		.aio_fildes = (uint32_t)worker->stress->fd,
		.aio_buf = (uint64_t)(uintptr_t)slot->buffer,
		.aio_nbytes = (uint64_t)slot->blocks * BLOCK_BYTES,
		.aio_offset = (int64_t)((worker->first_block + slot->first) * BLOCK_BYTES),
	};
	slot->in_flight = true;
	worker->in_flight++;
	if (syscall(SYS_io_submit, worker->context, 1L, list) != 1)
		return result_error("io_submit: %s", strerror(errno));
	return 0;
}

static int worker_reap(struct worker *worker)
{
	struct io_event events[DEPTH_MAX];
	long got = syscall(SYS_io_getevents, worker->context, 1L, (long)DEPTH_MAX, events, NULL), i;

	if (got < 1)
		return result_error("io_getevents: %s", got ? strerror(errno) : "nothing");
	for (i = 0; i < got; i++) {
		struct slot *slot = (struct slot *)(uintptr_t)events[i].data;

		slot->in_flight = false;
		worker->in_flight--;
		memset(worker->busy + slot->first, false, slot->blocks);
		if (events[i].res != (int64_t)slot->iocb.aio_nbytes)
			return result_error("%s of %u blocks at block %llu: %s", slot->write ? "write" : "read",
					    slot->blocks, (unsigned long long)(worker->first_block + slot->first),
					    events[i].res < 0 ? strerror((int)-events[i].res) : "short");
		if (slot->write)
			worker->writes++;
		else if (worker->reads++, slot_check(worker, slot))
			return 1;
	}
	return 0;
}

static int worker_random_io(struct worker *worker)
{
	unsigned int submitted = 0, i;

	while (submitted < worker->stress->requests) {
		for (i = 0; i < worker->stress->depth && submitted < worker->stress->requests; i++) {
			struct slot *slot = &worker->slots[i];

			if (slot->in_flight || !slot_choose(worker, slot))
				continue;
			slot->write = worker_random(worker) & 1;
			if (slot_submit(worker, slot))
				return 1;
			if (++submitted % FLUSH_EVERY == 0) {
				if (fsync(worker->stress->fd))
					return result_error("fsync: %s", strerror(errno));
				worker->flushes++;
			}
		}
		if (worker_reap(worker))
			return 1;
	}
	while (worker->in_flight)
		if (worker_reap(worker))
			return 1;
	return 0;
}

/* Every block once, in order: write (the first generation) or read and check (the last one). */
static int worker_sweep(struct worker *worker, bool write)
{
	struct slot *slot = &worker->slots[0];

	slot->write = write;
	for (slot->first = 0; slot->first < worker->blocks; slot->first += slot->blocks) {
		uint64_t left = worker->blocks - slot->first;

		slot->blocks = left < RUN_MAX ? (unsigned int)left : RUN_MAX;
		if (slot_submit(worker, slot) || worker_reap(worker))
			return 1;
	}
	return 0;
}

static void *worker_main(void *argument)
{
	struct worker *worker = argument;
	cpu_set_t cpus;

	/* One CPU for each thread: blk-mq maps CPUs to queues, and every queue shall have its share. */
	CPU_ZERO(&cpus);
	CPU_SET(worker->index % (unsigned int)sysconf(_SC_NPROCESSORS_ONLN), &cpus);
	sched_setaffinity(0, sizeof(cpus), &cpus);
	if (syscall(SYS_io_setup, worker->stress->depth, &worker->context)) {
		result_error("io_setup: %s", strerror(errno));
		worker->failed = true;
		return NULL;
	}
	worker->failed = worker_sweep(worker, true) || worker_random_io(worker) || worker_sweep(worker, false);
	syscall(SYS_io_destroy, worker->context);
	return NULL;
}

static void worker_prepare(struct worker *worker, const struct stress *stress, unsigned int index)
{
	unsigned int i;

	worker->stress = stress;
	worker->index = index;
	worker->blocks = stress->length / BLOCK_BYTES / stress->threads;
	worker->first_block = stress->offset / BLOCK_BYTES + index * worker->blocks;
	worker->random = stress->seed * 2654435761ULL + index + 1;
	worker->generation = buffer_allocate(worker->blocks * sizeof(*worker->generation));
	worker->busy = buffer_allocate(worker->blocks * sizeof(*worker->busy));
	for (i = 0; i < stress->depth; i++)
		worker->slots[i].buffer = buffer_allocate(RUN_MAX * BLOCK_BYTES);
}

int stress_run(const struct stress *stress)
{
	uint64_t reads = 0, writes = 0, flushes = 0, generations = 0, block;
	struct worker *workers;
	unsigned int i;
	bool failed = false;

	if (!stress->threads || !stress->depth || stress->depth > DEPTH_MAX || stress->offset % BLOCK_BYTES ||
	    !stress->length || stress->length % ((uint64_t)stress->threads * BLOCK_BYTES))
		return result_error("stress: offset and length in whole blocks for each thread, depth 1 to %d", DEPTH_MAX);
	workers = buffer_allocate(stress->threads * sizeof(*workers));
	for (i = 0; i < stress->threads; i++) {
		worker_prepare(&workers[i], stress, i);
		if (pthread_create(&workers[i].thread, NULL, worker_main, &workers[i]))
			return result_error("pthread_create failed");
	}
	for (i = 0; i < stress->threads; i++) {
		pthread_join(workers[i].thread, NULL);
		failed |= workers[i].failed;
		reads += workers[i].reads;
		writes += workers[i].writes;
		flushes += workers[i].flushes;
		for (block = 0; block < workers[i].blocks; block++)
			generations += workers[i].generation[block];
	}
	if (failed)
		return 1;
	result_print("reads", "%llu", (unsigned long long)reads);
	result_print("writes", "%llu", (unsigned long long)writes);
	result_print("flushes", "%llu", (unsigned long long)flushes);
	result_print("generations", "%llu", (unsigned long long)generations);
	return 0;
}
