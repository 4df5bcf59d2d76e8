/* Counters: written by the driver thread alone, read by anyone at any time, never locked. */
#include "ring/virtqueue.h"

const struct queue_stats *virtqueue_stats(struct virtqueue *vq)
{
	return &vq->stats;
}

void op_stats_add(struct op_stats *op, uint64_t duration_ns, uint64_t bytes, bool failed)
{
	stat_add(&op->requests, 1);
	stat_add(&op->bytes, bytes);
	stat_add(&op->duration_sum_ns, duration_ns);
	stat_add(&op->buckets[histogram_bucket(duration_ns)], 1);
	if (failed)
		stat_add(&op->errors, 1);
}

static void inflight_publish(struct virtqueue *vq, uint64_t count)
{
	store_relaxed(&vq->stats.inflight, count);
	store_relaxed(&vq->stats.oldest_ns, vq->oldest ? vq->oldest->start_ns : 0);
}

void inflight_add(struct virtqueue *vq, struct inflight *link)
{
	link->newer = NULL;
	link->older = vq->newest;
	if (vq->newest)
		vq->newest->newer = link;
	else
		vq->oldest = link;
	vq->newest = link;
	inflight_publish(vq, vq->stats.inflight + 1);
}

void inflight_remove(struct virtqueue *vq, struct inflight *link)
{
	if (link->older)
		link->older->newer = link->newer;
	else
		vq->oldest = link->newer;
	if (link->newer)
		link->newer->older = link->older;
	else
		vq->newest = link->older;
	inflight_publish(vq, vq->stats.inflight - 1);
}
