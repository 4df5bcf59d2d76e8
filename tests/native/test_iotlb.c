/*
 * A guest behind an IOMMU: nothing is known at first, every miss is asked for and answered, and translations are
 * taken away at any time. Two queues share one event fd, as in the daemon. Everything still arrives, also where every
 * page lies apart from its neighbours, that is, where rings are scattered.
 */
#include "load.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define PAGE 4096ull
#define REQUESTS 1200u

struct iommu {
	struct rig rig;
	struct iotlb *tlb;
	struct virtqueue *vq[LOAD_QUEUES];
	struct load loads[LOAD_QUEUES];
	int event_fd;
	uint64_t random, misses, invalidations;
};

/* What the front-end does with a miss: a few pages of it become known, then the queue may look again. */
static void answer(struct iommu *m, struct virtqueue *vq, const struct queue_report *report)
{
	uint64_t first = report->miss_iova & ~(PAGE - 1), pages = 1 + random_next(&m->random) % 16;
	uint64_t room = GUEST_GPA + GUEST_BYTES - first;

	CHECK(report->miss_iova >= GUEST_GPA && report->miss_iova < GUEST_GPA + GUEST_BYTES);
	CHECK(report->miss_perm == DP_PERM_READ || report->miss_perm == DP_PERM_WRITE ||
	      report->miss_perm == (DP_PERM_READ | DP_PERM_WRITE));
	if (pages * PAGE > room)
		pages = room / PAGE;
	/* All rights: a page that held only the one asked for would push out the other, for ever. */
	CHECK(iotlb_update(m->tlb, first, pages * PAGE, first - GUEST_GPA + GUEST_UVA, DP_PERM_READ | DP_PERM_WRITE) == 0);
	CHECK(rig_command(&m->rig, WORKER_RESUME, vq, NULL, NULL, -1) == 0);
	m->misses++;
}

static void unmap_something(struct iommu *m)
{
	if (random_next(&m->random) % 8 == 0)
		iotlb_clear(m->tlb);
	else
		iotlb_invalidate(m->tlb, GUEST_GPA + random_next(&m->random) % GUEST_BYTES, 1 + random_next(&m->random) % 65536);
	m->invalidations++;
}

static void serve_misses(struct iommu *m, const struct load *loads)
{
	struct pollfd wait = { .fd = m->event_fd, .events = POLLIN };
	struct queue_report report;
	uint64_t count;

	while (!load_acquire(&loads[0].finished) || !load_acquire(&loads[1].finished)) {
		/* The loads end without an event, so look at them too, between events. */
		if (poll(&wait, 1, 1) < 1)
			continue;
		CHECK(read(m->event_fd, &count, sizeof(count)) == sizeof(count));
		for (int i = 0; i < LOAD_QUEUES; i++) {
			virtqueue_report(m->vq[i], &report);
			CHECK(report.fault == VQ_FAULT_NONE);
			if (report.miss)
				answer(m, m->vq[i], &report);
		}
		if (random_next(&m->random) % 4 == 0)
			unmap_something(m);
	}
}

/* Any thread may look at a queue at any time: it sees one miss, none, or another, but nothing that never was. */
static void *watch_until_enough(void *argument)
{
	struct iommu *m = argument;
	struct queue_report report;

	for (int i = 0; i < LOAD_QUEUES; i++)
		while (load_acquire(&m->loads[i].completed) < REQUESTS) {
			virtqueue_report(m->vq[i], &report);
			CHECK(report.fault == VQ_FAULT_NONE);
			CHECK(!report.miss || report.miss_iova - GUEST_GPA < GUEST_BYTES);
			sched_yield();
		}
	for (int i = 0; i < LOAD_QUEUES; i++)
		load_stop(&m->loads[i]);
	return NULL;
}

/* The guest's memory in one mapping, or with a mapping for each page, the last one first. */
static struct memory_table *table_of(const struct guest *g, bool scattered)
{
	/* Nothing lies where the driver's addresses point if they were taken for guest physical ones. */
	struct memory_region whole = { .gpa = 1ull << 40, .size = g->size, .uva = GUEST_UVA, .mapping = g->mapping };
	static struct memory_region pages[GUEST_BYTES / PAGE];
	struct memory_table *table;
	int error;

	if (!scattered)
		return memory_table_new(&whole, 1);
	for (uint64_t i = 0; i < ARRAY_SIZE(pages); i++) {
		pages[i] = (struct memory_region){ .gpa = whole.gpa + i * PAGE, .size = PAGE, .uva = GUEST_UVA + i * PAGE };
		pages[i].mapping = mapping_new(g->fd, i * PAGE, PAGE, &error);
		CHECK(pages[i].mapping);
	}
	table = memory_table_new(pages, ARRAY_SIZE(pages));
	for (uint64_t i = 0; i < ARRAY_SIZE(pages); i++)
		mapping_unref(pages[i].mapping); /* the table has references of its own */
	return table;
}

static void run(uint32_t reactor, bool packed, bool event_idx, bool scattered)
{
	struct iommu m = { .tlb = iotlb_new(), .event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), .random = 123456789 };
	struct guest *g = guest_new(GUEST_BYTES, false);
	struct memory_table *table = table_of(g, scattered);
	pthread_t threads[LOAD_QUEUES], watcher;
	struct native_device *disk;
	int fd;

	CHECK(table);
	rig_open(&m.rig, reactor, 20);
	disk = disk_new(DISK_MEMORY, &fd);
	for (uint32_t i = 0; i < LOAD_QUEUES; i++) {
		struct queue_setup setup;

		load_open(&m.loads[i], g, i, packed, event_idx, DISK_MEMORY);
		m.vq[i] = virtqueue_new(i, m.event_fd);
		setup = driver_setup(&m.loads[i].driver);
		setup.features |= 1ull << 33;
		setup.space = VQ_SPACE_IOVA;
		CHECK(virtqueue_configure(m.vq[i], &setup, table, m.tlb) == 0);
		load_connect(&m.loads[i], m.vq[i]);
		CHECK(rig_command(&m.rig, WORKER_ATTACH, m.vq[i], disk, NULL, -1) == 0);
	}
	for (int i = 0; i < LOAD_QUEUES; i++)
		CHECK(pthread_create(&threads[i], NULL, load_thread, &m.loads[i]) == 0);
	CHECK(pthread_create(&watcher, NULL, watch_until_enough, &m) == 0);
	serve_misses(&m, m.loads);
	pthread_join(watcher, NULL);
	for (int i = 0; i < LOAD_QUEUES; i++) {
		pthread_join(threads[i], NULL);
		CHECK(rig_command(&m.rig, WORKER_DETACH, m.vq[i], NULL, NULL, -1) == 0);
		virtqueue_free(m.vq[i]);
		load_close(&m.loads[i]);
	}
	CHECK(m.misses > 20 && m.invalidations > 5);
	rig_close(&m.rig);
	native_device_unref(disk);
	iotlb_unref(m.tlb);
	memory_table_unref(table);
	guest_free(g);
	close(m.event_fd);
	printf("%s, %s%s%s: ok, %llu misses, %llu invalidations\n", reactor == REACTOR_EPOLL ? "epoll" : "io_uring",
	       packed ? "packed" : "split", event_idx ? ", EVENT_IDX" : "", scattered ? ", scattered" : "", (unsigned long long)m.misses,
	       (unsigned long long)m.invalidations);
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(100);
	for (unsigned variant = 0; variant < 8; variant++)
		run(variant % 4 == 1 || variant % 4 == 2 ? REACTOR_EPOLL : REACTOR_IO_URING, variant & 1, variant & 2,
		    variant & 4);
	return 0;
}
