/* Queues with answers that the driver has not seen: all of a round are published, and notified, at once. */
#include "worker/worker.h"

void worker_touch(struct worker *w, struct virtqueue *vq)
{
	if (vq->touched)
		return;
	if (w->touched_count == ARRAY_SIZE(w->touched)) {
		virtqueue_publish(vq);
		virtqueue_notify(vq);
		return;
	}
	vq->touched = true;
	w->touched[w->touched_count++] = vq;
}

void worker_publish_touched(struct worker *w)
{
	for (uint32_t i = 0; i < w->touched_count; i++) {
		w->touched[i]->touched = false;
		virtqueue_publish(w->touched[i]);
		virtqueue_notify(w->touched[i]);
	}
	w->touched_count = 0;
}
