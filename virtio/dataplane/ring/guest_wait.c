/*
 * Since when a request waits, as its guest feels it. A driver writes no time into its ring, so what is known is which
 * looks of ours did not find the request: it came after the last of them. That is an upper bound of the wait, and as
 * close as one look follows the other; after a sleep the bound is the moment when the kick woke the thread.
 *
 * What a turn leaves in the ring is counted once, and not again before all of it was popped: until then what came later
 * counts from that look. No clock is read here, and nothing for a single request but one histogram is written.
 */
#include "ring/virtqueue.h"

void guest_wait_reset(struct virtqueue *vq, uint64_t now_ns)
{
	vq->wait = (struct guest_wait){ .looked_ns = now_ns };
}

void guest_wait_begin(struct virtqueue *vq, uint64_t looked_ns)
{
	if (!vq->wait.unfinished && vq->wait.looked_ns < looked_ns)
		vq->wait.looked_ns = looked_ns;
}

void guest_wait_end(struct virtqueue *vq, bool empty, uint64_t now_ns)
{
	struct guest_wait *wait = &vq->wait;
	/* A ring whose place is not known at the moment may be full. */
	bool more = !empty && (!vq->resolved || vq->ops->has_work(vq));

	/* While it does a long request a worker does not look at its queue. */
	wait->unfinished = more || vq->unfinished;
	if (more && wait->waiting)
		return;
	wait->waiting = !more ? 0 : vq->resolved ? vq->ops->waiting(vq) : vq->size;
	wait->waiting_ns = wait->looked_ns;
	wait->looked_ns = now_ns;
}

void guest_wait_complete(struct virtqueue *vq, uint64_t available_ns, uint64_t now_ns)
{
	uint64_t waited = now_ns - available_ns;

	stat_add(&vq->stats.guest_sum_ns, waited);
	stat_add(&vq->stats.guest_buckets[histogram_bucket(waited)], 1);
}
