/*
 * A kernel that takes nothing from a worker's io_uring for a while (no memory), or does not watch a descriptor at all:
 * the worker obeys its commands meanwhile, and nothing that it was given is lost.
 */
#include "load.h"
#include "worker/worker.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct scene {
	struct guest *guest;
	struct rig rig;
	struct native_device *disk;
	int disk_fd;
	struct load loads[LOAD_QUEUES];
	struct virtqueue *queues[LOAD_QUEUES];
};

static void scene_open(struct scene *s)
{
	memset(s, 0, sizeof(*s));
	s->guest = guest_new(GUEST_BYTES, false);
	rig_open(&s->rig, REACTOR_IO_URING, 0);
	s->disk = disk_new(DISK_TMPFS_ASYNC, &s->disk_fd);
	for (uint32_t i = 0; i < LOAD_QUEUES; i++) {
		struct queue_setup setup;

		load_open(&s->loads[i], s->guest, i, false, false, DISK_TMPFS_ASYNC);
		s->loads[i].reads_only = true;
		s->queues[i] = virtqueue_new(i, s->rig.done_fd);
		setup = driver_setup(&s->loads[i].driver);
		CHECK(virtqueue_configure(s->queues[i], &setup, s->guest->table, NULL) == 0);
		load_connect(&s->loads[i], s->queues[i]);
	}
}

static void scene_close(struct scene *s)
{
	rig_close(&s->rig);
	for (uint32_t i = 0; i < LOAD_QUEUES; i++) {
		virtqueue_free(s->queues[i]);
		load_close(&s->loads[i]);
	}
	native_device_unref(s->disk);
	close(s->disk_fd);
	guest_free(s->guest);
}

static int attach(struct scene *s, uint32_t queue)
{
	return rig_command(&s->rig, WORKER_ATTACH, s->queues[queue], s->disk, NULL, -1);
}

static void refuse(bool on)
{
	__atomic_store_n(&submissions_fail, on, __ATOMIC_RELAXED);
}

/* Those that are in flight, and those that never were: a few ask for what the disk does not have. */
static uint64_t begun(struct scene *s, uint32_t queue)
{
	const struct queue_stats *stats = virtqueue_stats(s->queues[queue]);

	return load_relaxed(&stats->inflight) + load_relaxed(&stats->ops[0].requests);
}

/* More requests than the submission queue has room for, and the worker has looked at all of them. */
static void fill(struct scene *s, uint32_t queue)
{
	uint64_t one = 1;

	for (uint32_t tag = 0; tag < DRIVER_TAGS; tag++)
		load_submit(&s->loads[queue], tag);
	CHECK(write(s->loads[queue].kick_fd, &one, sizeof(one)) == sizeof(one));
	while (begun(s, queue) < s->loads[queue].submitted)
		sched_yield();
}

static void drain(struct scene *s, uint32_t queue)
{
	while (s->loads[queue].in_flight)
		if (!load_collect(&s->loads[queue]))
			sched_yield();
	CHECK(s->loads[queue].completed == s->loads[queue].submitted);
}

static void test_commands_are_obeyed_and_requests_complete_when_the_kernel_takes_them_again(void)
{
	struct scene s;

	scene_open(&s);
	CHECK(attach(&s, 0) == 0);
	refuse(true);
	fill(&s, 0);
	CHECK(rig_command(&s.rig, WORKER_RESUME, s.queues[0], NULL, NULL, -1) == 0);
	/* What the other queue asks for is behind what waits already, its doorbell too. */
	CHECK(attach(&s, 1) == 0);
	fill(&s, 1);
	CHECK(load_relaxed(&submissions_failed) > 0);
	CHECK(load_relaxed(&virtqueue_stats(s.queues[0])->inflight) > DRIVER_TAGS / 2);
	refuse(false);
	drain(&s, 0);
	drain(&s, 1);
	/* The doorbell that had to wait is watched now. */
	fill(&s, 1);
	drain(&s, 1);
	CHECK(rig_command(&s.rig, WORKER_DETACH, s.queues[0], NULL, NULL, -1) == 0);
	CHECK(rig_command(&s.rig, WORKER_DETACH, s.queues[1], NULL, NULL, -1) == 0);
	scene_close(&s);
}

static void test_a_queue_that_stops_meanwhile_stops_when_its_requests_are_done(void)
{
	struct worker_command detach = { .op = WORKER_DETACH, .fd = -1 };
	struct scene s;

	scene_open(&s);
	CHECK(attach(&s, 0) == 0);
	refuse(true);
	fill(&s, 0);
	for (uint32_t i = 0; i < 20; i++) { /* a doorbell that comes and goes finds room, however often */
		int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		struct worker_command ring = { .op = WORKER_SET_DOORBELL, .vq = s.queues[0], .doorbell = DOORBELL_PIO,
					       .fd = fd };

		CHECK(fd >= 0);
		if (i)
			refuse(false); /* the old eventfd must leave the poll set first */
		worker_post(s.rig.worker, &ring);
		CHECK(rig_wait(&s.rig, &ring) == 0);
		refuse(true);
	}
	detach.vq = s.queues[0];
	worker_post(s.rig.worker, &detach);
	CHECK(rig_command(&s.rig, WORKER_RESUME, s.queues[1], NULL, NULL, -1) == -EINVAL); /* obeyed: it drives another */
	refuse(false);
	CHECK(rig_wait(&s.rig, &detach) == 0);
	drain(&s, 0);
	scene_close(&s);
}

static void test_a_doorbell_that_cannot_be_watched_breaks_its_queue_and_no_other(void)
{
	struct queue_report report;
	struct scene s;
	int number, spare;

	scene_open(&s);
	CHECK(attach(&s, 1) == 0);
	number = virtqueue_doorbell_fd(s.queues[0], DOORBELL_KICK);
	spare = dup(number);
	CHECK(spare >= 0 && close(number) == 0);
	CHECK(attach(&s, 0) == 0);
	while (!virtqueue_broken(s.queues[0]))
		sched_yield();
	virtqueue_report(s.queues[0], &report);
	CHECK(report.fault == VQ_FAULT_KICK_POLL && report.length == EBADF);
	fill(&s, 1);
	drain(&s, 1);
	CHECK(rig_command(&s.rig, WORKER_DETACH, s.queues[0], NULL, NULL, -1) == 0);
	CHECK(rig_command(&s.rig, WORKER_DETACH, s.queues[1], NULL, NULL, -1) == 0);
	CHECK(dup2(spare, number) == number && close(spare) == 0); /* the queue closes it */
	scene_close(&s);
}

int main(void)
{
	alarm(100);
	test_commands_are_obeyed_and_requests_complete_when_the_kernel_takes_them_again();
	test_a_queue_that_stops_meanwhile_stops_when_its_requests_are_done();
	test_a_doorbell_that_cannot_be_watched_breaks_its_queue_and_no_other();
	return 0;
}
