/*
 * More queues than a worker remembers to publish at the end of a round, with more requests than go to the kernel at once:
 * the rest waits its turn, and nothing is lost.
 */
#include "load.h"
#include "worker/worker.h"

#include <sched.h>
#include <unistd.h>

#define QUEUES 70
#define TAGS 8 /* 70 * 8 = 560: more than an io_uring of ours has places */

static void run(uint32_t reactor, bool packed, enum disk_kind kind)
{
	struct guest *g = guest_new((uint64_t)QUEUES * QUEUE_AREA, false);
	struct load *loads = calloc(QUEUES, sizeof(*loads));
	struct virtqueue *vq[QUEUES];
	struct native_device *disk;
	uint64_t one = 1;
	struct rig rig;
	int fd;

	_Static_assert(QUEUES * TAGS > 512 && QUEUES > 64, "that is the point");
	CHECK(loads);
	rig_open(&rig, reactor, 0);
	disk = disk_new(kind, &fd);
	for (uint32_t i = 0; i < QUEUES; i++) {
		struct queue_setup setup;

		load_open(&loads[i], g, i, packed, true, kind);
		loads[i].reads_only = true;
		vq[i] = virtqueue_new(i, rig.done_fd);
		setup = driver_setup(&loads[i].driver);
		CHECK(virtqueue_configure(vq[i], &setup, g->table, NULL) == 0);
		load_connect(&loads[i], vq[i]);
		CHECK(rig_command(&rig, WORKER_ATTACH, vq[i], disk, NULL, -1) == 0);
	}
	for (int round = 0; round < 6; round++) {
		/* All rings are full before the first kick, so one round of the worker finds all of it. */
		for (int i = 0; i < QUEUES; i++)
			for (uint32_t tag = 0; tag < TAGS; tag++)
				load_submit(&loads[i], tag);
		for (int i = 0; i < QUEUES; i++)
			if (driver_needs_kick(&loads[i].driver))
				CHECK(write(loads[i].kick_fd, &one, sizeof(one)) == sizeof(one));
		for (int i = 0; i < QUEUES; i++)
			while (loads[i].in_flight)
				if (!load_collect(&loads[i]))
					sched_yield();
	}
	for (int i = 0; i < QUEUES; i++) {
		CHECK(rig_command(&rig, WORKER_DETACH, vq[i], NULL, NULL, -1) == 0);
		virtqueue_free(vq[i]);
		load_close(&loads[i]);
	}
	rig_close(&rig);
	native_device_unref(disk);
	guest_free(g);
	free(loads);
	if (fd >= 0)
		close(fd);
	printf("%s, %s, %s: ok\n", reactor == REACTOR_EPOLL ? "epoll" : "io_uring", disk_names[kind], packed ? "packed" : "split");
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(100);
	run(REACTOR_EPOLL, false, DISK_TMPFS_ASYNC); /* nothing completes before all queues were served */
	run(REACTOR_IO_URING, true, DISK_TMPFS_ASYNC);
	run(REACTOR_IO_URING, false, DISK_MEMORY);
	return 0;
}
