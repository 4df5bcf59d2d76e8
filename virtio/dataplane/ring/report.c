/*
 * What Python and the front-end are told of a queue: why it broke, which address the IOMMU has to translate, that its
 * ring began elsewhere. The driver thread writes, any thread may ask.
 */
#include "ring/notify.h"
#include "ring/virtqueue.h"

#include <unistd.h>

void virtqueue_raise_event(struct virtqueue *vq)
{
	uint64_t one = 1;

	/* Our own, non-blocking eventfd: when it is full, Python has been told long since. */
	if (write(vq->event_fd, &one, sizeof(one)) < 0)
		return;
}

int virtqueue_fail(struct virtqueue *vq, uint32_t fault, uint32_t head, uint64_t address, uint64_t length)
{
	if (load_relaxed(&vq->fault) != VQ_FAULT_NONE)
		return VQ_BROKEN;
	/* What was read from memory that has gone says nothing about the driver. */
	if (vq->table && load_acquire(&sigbus_deaths) != vq->deaths_seen && memory_table_dead(vq->table)) {
		fault = VQ_FAULT_MEMORY_GONE;
		head = 0;
		address = length = 0;
	}
	vq->report.fault = fault;
	vq->report.head = head;
	vq->report.address = address;
	vq->report.length = length;
	store_release(&vq->fault, fault);
	virtqueue_raise_event(vq);
	if (vq->err_fd >= 0)
		notify(vq->err_fd, vq->err_kind);
	return VQ_BROKEN;
}

void virtqueue_break(struct virtqueue *vq, uint32_t fault, uint32_t head, uint64_t address, uint64_t length)
{
	virtqueue_fail(vq, fault, head, address, length);
}

int virtqueue_miss(struct virtqueue *vq, uint64_t iova, uint32_t perm)
{
	vq->parked = true;
	store_relaxed(&vq->report.miss_iova, iova);
	store_relaxed(&vq->report.miss_perm, perm);
	if (++vq->misses == 0)
		vq->misses = 1;
	store_release(&vq->miss, vq->misses);
	virtqueue_raise_event(vq);
	return VQ_MISS;
}

void virtqueue_moved(struct virtqueue *vq, uint16_t base, uint16_t used)
{
	vq->report.moved_base = base;
	vq->report.moved_used = used;
	store_release(&vq->moved, 1);
	virtqueue_raise_event(vq);
}

void virtqueue_report(struct virtqueue *vq, struct queue_report *report)
{
	uint32_t fault = load_acquire(&vq->fault), miss = load_acquire(&vq->miss), moved = load_acquire(&vq->moved);

	*report = (struct queue_report){ .call_error = load_acquire(&vq->call_error) };
	if (fault) {
		report->fault = fault;
		report->head = vq->report.head;
		report->address = vq->report.address;
		report->length = vq->report.length;
	}
	if (miss) { /* at worst it is the next miss already, after a resume meanwhile; that one raises its event too */
		report->miss = miss;
		report->miss_iova = load_relaxed(&vq->report.miss_iova);
		report->miss_perm = load_relaxed(&vq->report.miss_perm);
	}
	if (moved) {
		report->moved = moved;
		report->moved_base = vq->report.moved_base;
		report->moved_used = vq->report.moved_used;
	}
}

void virtqueue_resume(struct virtqueue *vq)
{
	store_release(&vq->miss, 0);
	vq->parked = false;
}

int virtqueue_broken(struct virtqueue *vq)
{
	return load_relaxed(&vq->fault) != VQ_FAULT_NONE;
}
