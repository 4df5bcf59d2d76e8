/* The lesser promises of a worker: queues without kicks, commands it does not know, CPUs that are not there. */
#include "load.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void test_a_queue_without_a_kick_fd_is_served_all_the_same(uint32_t reactor, bool packed)
{
	struct guest *g = guest_new(GUEST_BYTES, false);
	struct queue_setup setup;
	struct native_device *disk;
	struct virtqueue *vq;
	struct rig rig;
	struct load l;
	int fd;

	rig_open(&rig, reactor, 0);
	disk = disk_new(DISK_MEMORY, &fd);
	load_open(&l, g, 0, packed, true, DISK_MEMORY);
	vq = virtqueue_new(0, rig.done_fd);
	setup = driver_setup(&l.driver);
	CHECK(virtqueue_configure(vq, &setup, g->table, NULL) == 0);
	load_connect(&l, vq);
	CHECK(virtqueue_set_doorbell(vq, DOORBELL_KICK, -1) == 0); /* vhost-user: the invalid-fd flag */
	for (int life = 0; life < 2; life++) {
		CHECK(rig_command(&rig, WORKER_ATTACH, vq, disk, NULL, -1) == 0);
		load_run(&l, 300);
		CHECK(rig_command(&rig, WORKER_DETACH, vq, NULL, NULL, -1) == 0);
	}
	CHECK(virtqueue_stats(vq)->kicks[DOORBELL_KICK] == 0);
	virtqueue_free(vq);
	native_device_unref(disk);
	rig_close(&rig);
	load_close(&l);
	guest_free(g);
}

static void test_commands_it_does_not_know_are_refused(uint32_t reactor)
{
	struct rig rig;

	rig_open(&rig, reactor, 0);
	CHECK(rig_command(&rig, 0, NULL, NULL, NULL, -1) == -EINVAL);
	CHECK(rig_command(&rig, 99, NULL, NULL, NULL, -1) == -EINVAL);
	rig_close(&rig);
}

/* Each command that changes a queue is for the worker that drives the queue, and for as long as it does. */
static void test_commands_for_a_queue_that_the_worker_does_not_drive_are_refused(uint32_t reactor)
{
	static const uint32_t ops[] = { WORKER_DETACH, WORKER_SET_MEMORY, WORKER_SET_CALL, WORKER_SET_ERR,
					WORKER_RESUME, WORKER_SET_DOORBELL };
	struct guest *g = guest_new(GUEST_BYTES, false);
	struct queue_setup setup;
	struct native_device *disk;
	struct virtqueue *vq;
	struct rig rig, other;
	struct load l;
	int fd;

	rig_open(&rig, reactor, 0);
	rig_open(&other, reactor, 0);
	disk = disk_new(DISK_MEMORY, &fd);
	load_open(&l, g, 0, false, true, DISK_MEMORY);
	vq = virtqueue_new(0, rig.done_fd);
	setup = driver_setup(&l.driver);
	CHECK(virtqueue_configure(vq, &setup, g->table, NULL) == 0);
	load_connect(&l, vq);
	for (uint32_t i = 0; i < ARRAY_SIZE(ops); i++) {
		CHECK(rig_command(&rig, ops[i], NULL, NULL, NULL, -1) == -EINVAL);
		CHECK(rig_command(&rig, ops[i], vq, NULL, g->table, -1) == -EINVAL);
	}
	CHECK(rig_command(&rig, WORKER_ATTACH, vq, NULL, NULL, -1) == -EINVAL);
	CHECK(rig_command(&rig, WORKER_ATTACH, NULL, disk, NULL, -1) == -EINVAL);
	CHECK(rig_command(&rig, WORKER_ATTACH, vq, disk, NULL, -1) == 0);
	CHECK(rig_command(&rig, WORKER_ATTACH, vq, disk, NULL, -1) == -EINVAL);
	for (uint32_t i = 0; i < ARRAY_SIZE(ops); i++)
		CHECK(rig_command(&other, ops[i], vq, NULL, g->table, -1) == -EINVAL);
	CHECK(rig_command(&other, WORKER_NUDGE, NULL, NULL, NULL, -1) == -EINVAL);
	load_run(&l, 300);
	CHECK(rig_command(&rig, WORKER_DETACH, vq, NULL, NULL, -1) == 0);
	CHECK(rig_command(&rig, WORKER_DETACH, vq, NULL, NULL, -1) == -EINVAL);
	virtqueue_free(vq);
	native_device_unref(disk);
	rig_close(&other);
	rig_close(&rig);
	load_close(&l);
	guest_free(g);
}

/* Two that come in one take of the inbox: the first one's poll is still being cancelled when the second is obeyed. */
static void test_the_second_of_two_detaches_at_once_is_refused(uint32_t reactor)
{
	struct worker_command commands[3] = { 0 };
	struct guest *g = guest_new(GUEST_BYTES, false);
	struct queue_setup setup;
	struct native_device *disk;
	struct virtqueue *vq;
	struct rig rig;
	struct load l;
	uint32_t done = 0;
	int fd;

	rig_open(&rig, reactor, 0);
	disk = disk_new(DISK_MEMORY, &fd);
	load_open(&l, g, 0, false, true, DISK_MEMORY);
	vq = virtqueue_new(0, rig.done_fd);
	setup = driver_setup(&l.driver);
	CHECK(virtqueue_configure(vq, &setup, g->table, NULL) == 0);
	load_connect(&l, vq);
	CHECK(rig_command(&rig, WORKER_ATTACH, vq, disk, NULL, -1) == 0);
	for (uint32_t i = 0; i < ARRAY_SIZE(commands); i++) {
		commands[i] = (struct worker_command){ .op = WORKER_DETACH, .vq = vq, .fd = -1 };
		worker_post(rig.worker, &commands[i]);
	}
	while (done < ARRAY_SIZE(commands)) {
		for (struct worker_command *list = worker_take_done(rig.worker); list; list = list->next)
			done++;
		sched_yield();
	}
	CHECK(commands[0].result == 0);
	CHECK(commands[1].result == -EINVAL && commands[2].result == -EINVAL);
	virtqueue_free(vq);
	native_device_unref(disk);
	rig_close(&rig);
	load_close(&l);
	guest_free(g);
}

static void test_commands_are_done_in_the_order_they_were_posted(uint32_t reactor)
{
	struct worker_command commands[200] = { 0 };
	struct virtqueue *vq;
	struct rig rig;
	uint32_t done = 0;

	rig_open(&rig, reactor, 0);
	vq = virtqueue_new(0, rig.done_fd);
	for (uint32_t i = 0; i < ARRAY_SIZE(commands); i++) {
		commands[i] = (struct worker_command){ .op = WORKER_RESUME, .vq = vq, .tag = i };
		worker_post(rig.worker, &commands[i]);
	}
	while (done < ARRAY_SIZE(commands)) {
		struct worker_command *list = worker_take_done(rig.worker);

		for (; list; list = list->next)
			CHECK(list->tag == done++);
		sched_yield();
	}
	virtqueue_free(vq);
	rig_close(&rig);
}

static void test_a_worker_that_cannot_run_where_it_should_is_not_started(uint32_t reactor)
{
	const uint32_t nowhere[] = { 1023, 65536 };
	int done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), error = 0;

	CHECK(!worker_new("nowhere", reactor, 0, nowhere, 1, done_fd, &error) && error == -EINVAL);
	CHECK(!worker_new("nowhere", reactor, 0, nowhere + 1, 1, done_fd, &error) && error == -EINVAL);
	close(done_fd);
}

static void test_cpu_time_is_told_while_the_worker_runs(uint32_t reactor)
{
	struct rig rig;
	uint64_t before;

	rig_open(&rig, reactor, 0);
	before = worker_cpu_ns(rig.worker);
	for (int i = 0; i < 100; i++)
		CHECK(rig_command(&rig, 99, NULL, NULL, NULL, -1) == -EINVAL);
	CHECK(worker_cpu_ns(rig.worker) > before);
	CHECK(load_relaxed(&worker_stats(rig.worker)->wakeups) > 0);
	rig_close(&rig);
}

int main(void)
{
	alarm(100);
	for (uint32_t reactor = REACTOR_IO_URING; reactor <= REACTOR_EPOLL; reactor++) {
		test_a_queue_without_a_kick_fd_is_served_all_the_same(reactor, false);
		test_a_queue_without_a_kick_fd_is_served_all_the_same(reactor, true);
		test_commands_it_does_not_know_are_refused(reactor);
		test_commands_for_a_queue_that_the_worker_does_not_drive_are_refused(reactor);
		test_the_second_of_two_detaches_at_once_is_refused(reactor);
		test_commands_are_done_in_the_order_they_were_posted(reactor);
		test_a_worker_that_cannot_run_where_it_should_is_not_started(reactor);
		test_cpu_time_is_told_while_the_worker_runs(reactor);
	}
	return 0;
}
