/*
 * Every kind of disk, ring and reactor: what is written is read back, byte for byte, however it is cut into
 * descriptors. The driver is one thread, the worker another; under ThreadSanitizer this checks the rings' order.
 */
#include "load.h"

#include <unistd.h>

static void transfer(uint32_t reactor, enum disk_kind kind, bool packed, bool event_idx, uint64_t requests)
{
	struct guest *g = guest_new(GUEST_BYTES, false);
	struct queue_setup setup;
	struct native_device *disk;
	struct virtqueue *vq;
	struct rig rig;
	struct load l;
	int fd;

	rig_open(&rig, reactor, (kind + packed) % 2 * 50); /* every other one sleeps at once */
	disk = disk_new(kind, &fd);
	load_open(&l, g, 0, packed, event_idx, kind);
	vq = virtqueue_new(0, rig.done_fd);
	setup = driver_setup(&l.driver);
	CHECK(virtqueue_configure(vq, &setup, g->table, NULL) == 0);
	load_connect(&l, vq);
	CHECK(rig_command(&rig, WORKER_ATTACH, vq, disk, NULL, -1) == 0);
	load_run(&l, requests / 2);
	l.polls = true; /* and now with interrupts refused: only the rings tell */
	load_run(&l, requests / 2);
	CHECK(rig_command(&rig, WORKER_DETACH, vq, NULL, NULL, -1) == 0);
	CHECK(virtqueue_stats(vq)->inflight == 0 && virtqueue_stats(vq)->oldest_ns == 0);
	virtqueue_free(vq);
	native_device_unref(disk);
	rig_close(&rig);
	load_close(&l);
	guest_free(g);
	if (fd >= 0)
		close(fd);
}

int main(int argc, char **argv)
{
	uint64_t requests = argc > 1 ? strtoull(argv[1], NULL, 10) : 600;

	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(100); /* a lost notification would wait for ever */
	for (uint32_t reactor = REACTOR_IO_URING; reactor <= REACTOR_EPOLL; reactor++)
		for (int kind = 0; kind < DISK_KINDS; kind++)
			for (int ring = 0; ring < 4; ring++) {
				transfer(reactor, kind, ring & 1, ring & 2, requests);
				printf("%s, %s, %s%s: ok\n", reactor == REACTOR_EPOLL ? "epoll" : "io_uring", disk_names[kind],
				       ring & 1 ? "packed" : "split", ring & 2 ? ", EVENT_IDX" : "");
			}
	return 0;
}
