/*
 * A worker that is going to sleep misses nothing that comes just then: neither a buffer nor a command. One thing at a
 * time, each sent a little later after the answer to the one before, so that all moments of falling asleep are met.
 */
#include "load.h"

#include <unistd.h>

static void linger(uint32_t steps)
{
	for (volatile uint32_t i = 0; i < steps; i++)
		__asm__ volatile("pause");
}

static void buffers(uint32_t reactor, bool packed, bool event_idx, uint32_t rounds)
{
	struct guest *g = guest_new(GUEST_BYTES, false);
	struct queue_setup setup;
	struct native_device *disk;
	struct virtqueue *vq;
	uint64_t one = 1;
	struct rig rig;
	struct load l;
	int fd;

	rig_open(&rig, reactor, 0);
	disk = disk_new(DISK_NULL, &fd);
	load_open(&l, g, 0, packed, event_idx, DISK_NULL);
	l.reads_only = true;
	vq = virtqueue_new(0, rig.done_fd);
	setup = driver_setup(&l.driver);
	CHECK(virtqueue_configure(vq, &setup, g->table, NULL) == 0);
	load_connect(&l, vq);
	/* No call fd: the timer that guards notifications also wakes a worker now and then, and would hide a loss. */
	CHECK(virtqueue_set_call(vq, -1) == 0);
	CHECK(rig_command(&rig, WORKER_ATTACH, vq, disk, NULL, -1) == 0);
	for (uint32_t i = 0; i < rounds; i++) {
		load_submit(&l, 0);
		if (driver_needs_kick(&l.driver))
			CHECK(write(l.kick_fd, &one, sizeof(one)) == sizeof(one));
		while (!load_collect(&l))
			__asm__ volatile("pause");
		linger(i % 128);
	}
	CHECK(rig_command(&rig, WORKER_DETACH, vq, NULL, NULL, -1) == 0);
	virtqueue_free(vq);
	native_device_unref(disk);
	rig_close(&rig);
	load_close(&l);
	guest_free(g);
}

static void commands(uint32_t reactor, uint32_t rounds)
{
	struct virtqueue *vq;
	struct rig rig;

	rig_open(&rig, reactor, 0);
	vq = virtqueue_new(0, rig.done_fd);
	for (uint32_t i = 0; i < rounds; i++) {
		struct worker_command command = { .op = WORKER_RESUME, .vq = vq }, *done;

		worker_post(rig.worker, &command);
		while (!(done = worker_take_done(rig.worker)))
			__asm__ volatile("pause");
		CHECK(done == &command && done->result == -EINVAL); /* the worker does not drive it, but answers */
		linger(i % 128);
	}
	virtqueue_free(vq);
	rig_close(&rig);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 6000;

	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(100);
	for (uint32_t reactor = REACTOR_IO_URING; reactor <= REACTOR_EPOLL; reactor++) {
		for (int ring = 0; ring < 4; ring++)
			buffers(reactor, ring & 1, ring & 2, rounds);
		commands(reactor, 4 * rounds);
		printf("%s: ok\n", reactor == REACTOR_EPOLL ? "epoll" : "io_uring");
	}
	return 0;
}
