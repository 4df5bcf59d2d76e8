/*
 * Everything that may happen to a queue while its driver keeps it busy: stopped and started, moved to another worker,
 * set up anew where it stood, given other memory and other call fds. No request is lost, answered twice or wrong.
 */
#include "load.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#define PLACES 2 /* workers */

struct queue {
	struct load load;
	struct virtqueue *vq;
	uint32_t place;
	pthread_t thread;
};

struct storm {
	struct guest *guest;
	struct native_device *disk;
	struct rig rigs[PLACES];
	struct queue queues[LOAD_QUEUES];
	struct memory_table *table; /* the newest */
	uint64_t random;
};

static int command(struct storm *s, struct queue *q, uint32_t op, int fd)
{
	return rig_command(&s->rigs[q->place], op, q->vq, s->disk, s->table, fd);
}

static void stop_start(struct storm *s, struct queue *q)
{
	CHECK(command(s, q, WORKER_DETACH, -1) == 0);
	q->place = random_next(&s->random) % PLACES;
	CHECK(command(s, q, WORKER_ATTACH, -1) == 0);
}

static void set_up_anew(struct storm *s, struct queue *q)
{
	struct queue_setup setup = driver_setup(&q->load.driver);

	CHECK(command(s, q, WORKER_DETACH, -1) == 0);
	setup.base = virtqueue_base(q->vq);
	if (random_next(&s->random) % 2) { /* a new life: another virtqueue goes on where this one stood */
		virtqueue_free(q->vq);
		q->vq = virtqueue_new(q->load.queue, s->rigs[0].done_fd);
		load_connect(&q->load, q->vq);
	}
	CHECK(virtqueue_configure(q->vq, &setup, s->table, NULL) == 0);
	CHECK(virtqueue_base(q->vq) == setup.base);
	CHECK(command(s, q, WORKER_ATTACH, -1) == 0);
}

/* The same memory once more, at another place in our address space; or the same place and a region more beside it. */
static struct memory_table *other_table(struct storm *s)
{
	struct guest *g = s->guest;
	struct memory_region regions[2] = {
		{ .gpa = GUEST_GPA, .size = g->size, .uva = GUEST_UVA, .mapping = g->mapping },
		{ .gpa = 0x1000, .size = 4096, .uva = 0x1000 },
	};
	struct memory_table *table;
	int error;

	regions[1].mapping = mapping_new(g->fd, 4096, 4096, &error);
	CHECK(regions[1].mapping);
	if (g->own_base) { /* the driver has a mapping of its own, so the device's may change */
		regions[0].mapping = mapping_new(g->fd, 0, g->size, &error);
		CHECK(regions[0].mapping);
	}
	table = memory_table_new(regions, 2);
	CHECK(table);
	mapping_unref(regions[1].mapping);
	if (g->own_base)
		mapping_unref(regions[0].mapping);
	return table;
}

static void set_memory(struct storm *s)
{
	struct memory_table *before = s->table;

	s->table = other_table(s);
	for (int i = 0; i < LOAD_QUEUES; i++)
		CHECK(command(s, &s->queues[i], WORKER_SET_MEMORY, -1) == 0);
	memory_table_unref(before);
}

static void storm_run(uint32_t reactor, enum disk_kind kind, bool packed, bool event_idx, bool remap, int rounds)
{
	struct storm s = { .guest = guest_new(GUEST_BYTES, remap), .random = 0x2545f4914f6cdd1d };
	int fd;

	s.table = memory_table_ref(s.guest->table);
	s.disk = disk_new(kind, &fd);
	for (int i = 0; i < PLACES; i++)
		rig_open(&s.rigs[i], reactor, i * 40); /* one that polls, one that sleeps at once */
	for (uint32_t i = 0; i < LOAD_QUEUES; i++) {
		struct queue *q = &s.queues[i];
		struct queue_setup setup;

		load_open(&q->load, s.guest, i, packed, event_idx, kind);
		q->vq = virtqueue_new(i, s.rigs[0].done_fd);
		q->place = i % PLACES;
		setup = driver_setup(&q->load.driver);
		CHECK(virtqueue_configure(q->vq, &setup, s.table, NULL) == 0);
		load_connect(&q->load, q->vq);
		CHECK(command(&s, q, WORKER_ATTACH, -1) == 0);
		CHECK(pthread_create(&q->thread, NULL, load_thread, &q->load) == 0);
	}
	for (int round = 0; round < rounds; round++) {
		struct queue *q = &s.queues[random_next(&s.random) % LOAD_QUEUES];

		switch (round % 4) {
		case 0:
			stop_start(&s, q);
			break;
		case 1:
			set_up_anew(&s, q);
			break;
		case 2:
			set_memory(&s);
			break;
		case 3:
			CHECK(command(&s, q, WORKER_SET_CALL, load_call_fd(&q->load)) == 0);
			break;
		}
		load_wait_progress(&q->load, random_next(&s.random) % 40);
	}
	for (int i = 0; i < LOAD_QUEUES; i++) {
		struct queue *q = &s.queues[i];
		struct queue_report report;

		load_stop(&q->load);
		pthread_join(q->thread, NULL);
		CHECK(command(&s, q, WORKER_DETACH, -1) == 0);
		virtqueue_report(q->vq, &report);
		CHECK(report.fault == VQ_FAULT_NONE && report.miss == 0);
		virtqueue_free(q->vq);
		load_close(&q->load);
	}
	for (int i = 0; i < PLACES; i++)
		rig_close(&s.rigs[i]);
	native_device_unref(s.disk);
	memory_table_unref(s.table);
	guest_free(s.guest);
	if (fd >= 0)
		close(fd);
}

int main(int argc, char **argv)
{
	static const enum disk_kind kinds[] = { DISK_MEMORY, DISK_TMPFS_ASYNC, DISK_FILE };
	int rounds = argc > 1 ? atoi(argv[1]) : 40;

	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(100);
	for (uint32_t reactor = REACTOR_IO_URING; reactor <= REACTOR_EPOLL; reactor++)
		for (unsigned variant = 0; variant < 8; variant++) {
			enum disk_kind kind = kinds[(variant + reactor) % ARRAY_SIZE(kinds)];

			storm_run(reactor, kind, variant & 1, variant & 2, variant & 4, rounds);
			printf("%s, %s, %s%s%s: ok\n", reactor == REACTOR_EPOLL ? "epoll" : "io_uring", disk_names[kind],
			       variant & 1 ? "packed" : "split", variant & 2 ? ", EVENT_IDX" : "",
			       variant & 4 ? ", memory mapped anew" : "");
		}
	return 0;
}
