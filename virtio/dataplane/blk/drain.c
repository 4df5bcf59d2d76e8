/* A queue stops while requests of it are kept (blk/kept.c), and only those are left of it. */
#include "blk/blk.h"

/* Give back to the ring those of `list` that were popped last, without a gap; the others are left in the list. */
static struct request *rewind_last(struct virtqueue *vq, struct request *list)
{
	uint32_t heads[QUEUE_REQUESTS], count = 0, slots = 0;
	struct request **at, *r;

	for (;;) {
		for (at = &list; (r = *at) && r->number != vq->popped - 1 - count; at = &r->next)
			;
		if (!r)
			break;
		*at = r->next;
		heads[count++] = r->head;
		slots += r->slots;
		blk_let_go(r);
		request_withdraw(r);
	}
	virtqueue_unpop(vq, heads, count, slots);
	return list;
}

/*
 * The queue stops, and only kept requests are left of it. A driver finds those that were popped last in its ring, as if
 * they had never been taken. Before others that were answered nothing can be given back: those requests get an error.
 */
void blk_drain(struct native_device *device, struct virtqueue *vq)
{
	struct blk_device *blk = (struct blk_device *)device;
	struct request *list, *next;

	if (likely(!load_relaxed(&blk->errors.kept)))
		return;
	/* Some may wait for blocks that a kept request has claimed: they have not begun, and do not begin any more. */
	blk_keep_waiting(blk, blk_range_withdraw(blk, vq));
	list = blk_take_kept(blk, vq);
	if (list && !load_relaxed(&vq->fault))
		list = rewind_last(vq, list);
	for (; list; list = next) {
		next = list->next;
		blk_finish(list, VIRTIO_BLK_S_IOERR);
	}
}
