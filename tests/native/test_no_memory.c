/*
 * A host without memory: a chain that cannot be kept goes back to the driver, empty, and the driver is told. What was
 * popped before it is served, and so is all that comes after.
 */
#include "load.h"

#include <sys/eventfd.h>
#include <unistd.h>

static uint64_t interrupts(int fd)
{
	uint64_t count = 0;

	return read(fd, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

static void no_room_for_a_chain(bool packed, bool event_idx, uint32_t before)
{
	struct guest *g = guest_new(GUEST_BYTES, false);
	int event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct virtqueue *vq = virtqueue_new(0, event_fd);
	uint32_t lengths[DRIVER_TAGS] = { 0 }, tag, written;
	struct chain *chains[DRIVER_TAGS];
	struct queue_setup setup;
	struct driver d;

	driver_init(&d, g, GUEST_GPA, packed, event_idx);
	setup = driver_setup(&d);
	CHECK(virtqueue_configure(vq, &setup, g->table, NULL) == 0);
	CHECK(virtqueue_set_call(vq, dup(call_fd)) == 0);
	CHECK(interrupts(call_fd) == 1); /* once for a new call fd */
	CHECK(!driver_wait_begin(&d));
	for (tag = 0; tag <= before; tag++)
		driver_add(&d, tag, &(struct piece){ GUEST_GPA + DRIVER_AREA + 64 * tag, 64, true }, 1, false);
	if (before)
		CHECK(virtqueue_pop_many(vq, chains, before, UINT32_MAX, 0) == (int)before);
	malloc_fails = 1;
	CHECK(virtqueue_pop_many(vq, chains + before, 8, UINT32_MAX, 0) == 0);
	CHECK(malloc_fails == 0);
	CHECK(driver_used(&d, &tag, &written) && tag == before && written == 0);
	CHECK(interrupts(call_fd) == 1);
	virtqueue_push_many(vq, chains, lengths, before);
	for (uint32_t i = 0; i < before; i++)
		CHECK(driver_used(&d, &tag, &written) && tag == i);
	CHECK(!driver_used(&d, &tag, &written));
	CHECK(virtqueue_stats(vq)->inflight == 0);
	virtqueue_free(vq);
	guest_free(g);
	close(event_fd);
	close(call_fd);
}

int main(void)
{
	alarm(100);
	for (int ring = 0; ring < 4; ring++)
		for (uint32_t before = 0; before < 3; before++)
			no_room_for_a_chain(ring & 1, ring & 2, before);
	return 0;
}
