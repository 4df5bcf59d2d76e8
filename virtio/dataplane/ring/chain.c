/* How the Python pump drives a queue: the same pops and pushes as a worker's, chain by chain as opaque handles. */
#include "ring/virtqueue.h"
#include "memory/pieces.h"

#include <stdlib.h>

#define POP_BYTES (1u << 20) /* popped at once: between batches others have their turn */

struct chain {
	struct inflight link; /* first */
	struct virtqueue *vq;
	struct memory_table *table; /* reference: its buffers stay mapped as long as the chain lives */
	struct chain_view view;
	uint32_t epoch; /* the queue's when it was popped */
	uint32_t op;
	bool failed;
	struct iovec iov[];
};

static struct chain *chain_keep(struct virtqueue *vq, const struct chain_view *view)
{
	uint32_t count = view->readable_count + view->writable_count;
	struct chain *c = malloc(sizeof(*c) + count * sizeof(c->iov[0]));

	if (!c)
		return NULL;
	memcpy(c->iov, view->iov, count * sizeof(c->iov[0]));
	c->vq = vq;
	c->view = *view;
	c->view.iov = c->iov;
	c->table = memory_table_ref(vq->table);
	c->epoch = vq->epoch;
	c->op = 0;
	c->failed = false;
	c->link.start_ns = now_ns();
	c->link.available_ns = 0;
	inflight_add(vq, &c->link);
	return c;
}

static void chain_release(struct chain *c)
{
	inflight_remove(c->vq, &c->link);
	memory_table_unref(c->table);
	free(c);
}

/* The pump has no other queues to look at between two looks at this one. Nothing rang in a sleep that it ended by itself. */
static void look_begins(struct virtqueue *vq)
{
	uint64_t now = vq->kicked || !vq->wait.looked_ns ? now_ns() : 0;

	guest_wait_begin(vq, now);
}

int virtqueue_pop_many(struct virtqueue *vq, struct chain **chains, uint32_t max, uint32_t request_max,
		       uint32_t as_they_come)
{
	static __thread struct iovec scratch[CHAIN_IOV_MAX];
	struct chain_view view = { .iov = scratch };
	uint32_t count = 0;
	uint64_t bytes = 0;
	int rc = VQ_EMPTY;

	if (!vq->configured)
		return 0;
	if (as_they_come)
		look_begins(vq);
	while (count < max && bytes < POP_BYTES && (rc = virtqueue_pop(vq, &view)) == VQ_CHAIN) {
		if (unlikely(view.readable_len > request_max || view.writable_len > request_max)) {
			virtqueue_unpop(vq, &view.head, 1, view.slots);
			rc = virtqueue_fail(vq, VQ_FAULT_REQUEST_MAX, view.head, view.readable_len, view.writable_len);
			break;
		}
		bytes += view.readable_len + view.writable_len;
		chains[count] = chain_keep(vq, &view);
		if (!chains[count]) { /* no memory: the driver gets the chain back, empty */
			virtqueue_push(vq, view.head, view.slots, 0);
			virtqueue_publish(vq);
			virtqueue_notify(vq);
			break;
		}
		if (as_they_come) {
			guest_wait_popped(vq);
			chains[count]->link.available_ns = vq->wait.available_ns;
		}
		count++;
	}
	if (as_they_come)
		guest_wait_end(vq, rc == VQ_EMPTY, count ? chains[0]->link.start_ns : now_ns());
	if (vq->kicked && count == 0 && !vq->parked)
		stat_add(&vq->stats.empty_wakeups, 1);
	vq->kicked = false;
	return count == 0 && rc == VQ_BROKEN ? VQ_BROKEN : (int)count;
}

void chain_info(const struct chain *c, struct chain_info *info)
{
	info->readable_len = c->view.readable_len;
	info->writable_len = c->view.writable_len;
	info->head = c->view.head;
}

int64_t chain_read(const struct chain *c, uint64_t offset, void *buffer, uint64_t length)
{
	struct pieces from = pieces_of(c->iov, c->view.readable_count);

	pieces_skip(&from, offset);
	return (int64_t)pieces_read(&from, buffer, length);
}

int64_t chain_write(struct chain *c, uint64_t offset, const void *buffer, uint64_t length)
{
	struct pieces to = pieces_of(c->iov + c->view.readable_count, c->view.writable_count);

	pieces_skip(&to, offset);
	return (int64_t)pieces_write(&to, buffer, length);
}

void chain_time(struct chain *c, uint32_t op, uint32_t failed)
{
	c->op = op < DP_QUEUE_OPS ? op : DP_QUEUE_OPS - 1;
	c->failed = failed;
}

void virtqueue_push_many(struct virtqueue *vq, struct chain **chains, const uint32_t *written, uint32_t count)
{
	uint64_t now = now_ns();

	for (uint32_t i = 0; i < count; i++) {
		struct chain *c = chains[i];

		/* 2.7.8.2: never more than the driver gave. */
		uint32_t n = written[i] > c->view.writable_len ? (uint32_t)c->view.writable_len : written[i];

		if (likely(c->epoch == vq->epoch)) /* or else its ring is gone, and its head means nothing any more */
			virtqueue_push(vq, c->view.head, c->view.slots, n);
		op_stats_add(&vq->stats.ops[c->op], now - c->link.start_ns, c->view.readable_len + n, c->failed);
		if (c->link.available_ns)
			guest_wait_complete(vq, c->link.available_ns, now);
		chain_release(c);
	}
	virtqueue_publish(vq);
	virtqueue_notify(vq);
}

void virtqueue_rewind(struct virtqueue *vq, struct chain **chains, uint32_t count)
{
	uint32_t slots = 0, rewound = 0;

	for (uint32_t i = 0; i < count; i++) {
		if (chains[i]->epoch == vq->epoch) {
			slots += chains[i]->view.slots;
			rewound++;
		}
		chain_drop(chains[i]);
	}
	if (rewound)
		vq->ops->rewind(vq, rewound, slots);
}

void chain_drop(struct chain *c)
{
	if (c->epoch == c->vq->epoch) {
		c->vq->inflight_heads[c->view.head / 64] &= ~(1ull << (c->view.head & 63));
		c->vq->inflight--;
	}
	chain_release(c);
}
