/*
 * Requests that wait for I/O: a pool a queue, so that nothing is allocated on the way, and so that a disk that hangs
 * holds its own requests and no neighbour's. Worker thread only.
 */
#include "worker/worker.h"

#include <stdlib.h>

int requests_make(struct virtqueue *vq, const struct native_device *device)
{
	uint32_t share = DEVICE_REQUESTS / (device->queues ? device->queues : 1), size;

	share = share < QUEUE_REQUESTS_MIN ? QUEUE_REQUESTS_MIN : share > QUEUE_REQUESTS ? QUEUE_REQUESTS : share;
	size = vq->size < share ? vq->size : share;
	vq->pool = calloc(size, sizeof(*vq->pool)); /* memory that was never used is not there yet */
	if (!vq->pool)
		return -ENOMEM;
	vq->pool_size = size;
	vq->pool_used = 0;
	vq->free_requests = NULL;
	return 0;
}

void requests_drop(struct virtqueue *vq)
{
	free(vq->pool);
	vq->pool = vq->free_requests = NULL;
	vq->pool_size = vq->pool_used = 0;
}

static struct request *request_take(struct virtqueue *vq)
{
	struct request *r = vq->free_requests;

	if (r)
		vq->free_requests = r->next;
	else if (vq->pool_used < vq->pool_size)
		r = &vq->pool[vq->pool_used++];
	return r;
}

struct request *request_start(struct worker *w, struct virtqueue *vq, struct native_device *device,
			      const struct chain_view *chain, uint64_t start_ns)
{
	struct request *r = request_take(vq);

	if (!r)
		return NULL;
	r->worker = w;
	r->vq = vq;
	r->device = native_device_ref(device);
	r->table = memory_table_ref(vq->table);
	r->head = chain->head;
	r->slots = chain->slots;
	r->bounce = NULL;
	r->many = NULL;
	r->trimmed = 0;
	r->range.claimed = false;
	r->segment = r->segment_count = 0;
	r->zeroing = r->tried = false;
	r->kept = 0;
	r->number = vq->popped - 1;
	r->link.start_ns = start_ns;
	r->link.available_ns = vq->wait.available_ns;
	inflight_add(vq, &r->link);
	return r;
}

static void recycle(struct request *r)
{
	struct virtqueue *vq = r->vq;

	memory_table_unref(r->table);
	native_device_unref(r->device);
	r->next = vq->free_requests;
	vq->free_requests = r;
}

void request_finish(struct request *r, uint32_t written, bool failed)
{
	struct worker *w = r->worker;
	struct virtqueue *vq = r->vq;
	uint64_t now = now_ns();

	worker_clock(w, now);
	inflight_remove(vq, &r->link);
	virtqueue_push(vq, r->head, r->slots, written);
	op_stats_add(&vq->stats.ops[r->op], now - r->link.start_ns, failed ? 0 : r->bytes, failed);
	guest_wait_complete(vq, r->link.available_ns, now);
	worker_touch(w, vq);
	recycle(r);
}

void request_withdraw(struct request *r)
{
	inflight_remove(r->vq, &r->link);
	recycle(r);
}

void requests_push(struct request **stack, struct request *r)
{
	struct worker *w = r->worker; /* once pushed, r may be finished and gone */
	struct request *head = load_relaxed(stack);

	do
		r->next = head;
	while (!__atomic_compare_exchange_n(stack, &head, r, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
	worker_wake(w);
}

struct request *requests_take(struct request **stack)
{
	struct request *list, *ordered = NULL;

	if (!load_relaxed(stack))
		return NULL;
	list = __atomic_exchange_n(stack, NULL, __ATOMIC_ACQ_REL);
	while (list) {
		struct request *next = list->next;

		list->next = ordered;
		ordered = list;
		list = next;
	}
	return ordered;
}

void request_hand_over(struct request *r)
{
	requests_push(&r->worker->handed, r);
}

bool worker_take_handed(struct worker *w)
{
	struct request *r = requests_take(&w->handed), *next;
	bool any = r != NULL;

	for (; r; r = next) {
		next = r->next;
		r->device->ops->resumed(r);
	}
	return any;
}
