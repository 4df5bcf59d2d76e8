/* How a request meets the reactor, and how it ends: answered, or kept because its storage failed. */
#include "blk/blk.h"

#include <stdlib.h>

void blk_submit(struct request *r)
{
	r->worker->reactor->submit(r->worker, r);
}

/* Of a file in the page cache the kernel may copy at once what it is handed. */
void blk_submit_part(struct request *r, bool first)
{
	struct blk_device *blk = (struct blk_device *)r->device;

	blk_part_trim(r);
	if (first || blk->setup.direct)
		blk_submit(r);
	else
		worker_submit_part(r->worker, r);
}

void blk_let_go(struct request *r)
{
	if (unlikely(r->range.claimed))
		blk_range_release((struct blk_device *)r->device, r);
	free(r->bounce);
	free(r->many);
}

void blk_finish(struct request *r, int status)
{
	bool read = r->op == BLK_OP_READ && status == VIRTIO_BLK_S_OK;

	if (unlikely(r->tried))
		blk_tried(r);
	blk_let_go(r);
	*r->status_hva = (uint8_t)status;
	request_finish(r, read ? (uint32_t)r->bytes + 1 : 1, status != VIRTIO_BLK_S_OK);
}

void blk_fail(struct request *r, int error)
{
	blk_count_error((struct blk_device *)r->device, r->op, error);
	if (!blk_keep(r, error))
		blk_finish(r, VIRTIO_BLK_S_IOERR);
}

void blk_no_memory(struct request *r)
{
	blk_count_error((struct blk_device *)r->device, r->op, ENOMEM);
	blk_finish(r, VIRTIO_BLK_S_IOERR);
}
