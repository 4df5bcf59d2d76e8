/*
 * Flushes. The kernel reports a write-back that failed once to each open file description, to the sync that looks
 * first, and then forgets the loss: pages that were not written count as clean (errseq_t; fsync(2), "BUGS" of old).
 * So:
 *
 * - a worker syncs through a description of its own, where no sync of another worker can take its error;
 * - a worker has one sync of an image in flight. Flushes that come meanwhile wait, and share the next one: it begins
 *   after all of them, and so covers what each has to cover (5.2.6.2);
 * - after a sync that failed every later flush fails, until the image is reopened.
 */
#include "blk/blk.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

/* The place of `w` in the list of this image's workers; NULL: no memory. Worker thread. */
static struct blk_lane *lane_of(struct blk_device *blk, struct worker *w)
{
	struct blk_lane *first = load_acquire(&blk->lanes), *lane;
	uint32_t number;

	for (lane = first; lane; lane = lane->next)
		if (lane->worker == w)
			return lane;
	lane = calloc(1, sizeof(*lane));
	if (!lane)
		return NULL;
	lane->worker = w;
	lane->waiting_tail = &lane->waiting;
	do {
		lane->next = first;
	} while (!__atomic_compare_exchange_n(&blk->lanes, &first, lane, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
	number = __atomic_fetch_add(&blk->lane_count, 1, __ATOMIC_RELAXED);
	lane->fd = number == 0 || number > blk->sync_fd_count ? blk->setup.fd : blk->sync_fds[number - 1];
	return lane;
}

static void sync_done(struct request *r, int result)
{
	blk_finish(r, result < 0 ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
}

static void sync_begin(struct blk_lane *lane, struct request *batch)
{
	lane->syncing = batch;
	batch->io = IO_FSYNC;
	batch->fd = lane->fd;
	batch->worker->reactor->submit(batch->worker, batch);
}

void blk_sync(struct blk_device *blk, struct request *r)
{
	struct blk_lane *lane = lane_of(blk, r->worker);

	r->io = IO_FSYNC;
	r->with = NULL;
	if (!lane) {
		sync_done(r, -ENOMEM);
	} else if (lane->syncing) {
		*lane->waiting_tail = r;
		lane->waiting_tail = &r->with;
	} else {
		sync_begin(lane, r);
	}
}

static void batch_done(struct request *batch, int result)
{
	for (struct request *next; batch; batch = next) {
		next = batch->with; /* the request is the pool's again once it is done */
		sync_done(batch, result);
	}
}

void blk_sync_ended(struct blk_device *blk, struct request *r, int result)
{
	struct blk_lane *lane = lane_of(blk, r->worker);
	struct request *waiting = lane->waiting;

	lane->syncing = NULL;
	lane->waiting = NULL;
	lane->waiting_tail = &lane->waiting;
	if (result < 0)
		blk_count_sync_error(blk, r->op, -result);
	else if (waiting)
		sync_begin(lane, waiting);
	batch_done(r, result);
	if (result < 0)
		batch_done(waiting, result); /* what they have to cover is lost, too */
}

int blk_use_sync_fds(struct native_device *device, const int *fds, uint32_t count)
{
	struct blk_device *blk = (struct blk_device *)device;

	blk->sync_fds = calloc(count, sizeof(*fds));
	if (!blk->sync_fds)
		return -ENOMEM;
	memcpy(blk->sync_fds, fds, count * sizeof(*fds));
	blk->sync_fd_count = count;
	return 0;
}

int blk_reopened(struct native_device *device, int fd, int cached_fd, const int *sync_fds, uint32_t count)
{
	struct blk_device *blk = (struct blk_device *)device;

	if (count != blk->sync_fd_count || (cached_fd < 0) != (blk->setup.cached_fd < 0))
		return -EINVAL;
	if (dup3(fd, blk->setup.fd, O_CLOEXEC) < 0 || (cached_fd >= 0 && dup3(cached_fd, blk->setup.cached_fd, O_CLOEXEC) < 0))
		return -errno;
	for (uint32_t i = 0; i < count; i++)
		if (dup3(sync_fds[i], blk->sync_fds[i], O_CLOEXEC) < 0)
			return -errno;
	/* A sync of an old description that still fails sets it again: what it covers began before. */
	store_release(&blk->errors.sync_error, 0);
	__atomic_add_fetch(&blk->errors.reopened, 1, __ATOMIC_RELAXED);
	blk_raise_news(blk);
	return 0;
}

void blk_flush_free(struct blk_device *blk)
{
	struct blk_lane *next;

	for (struct blk_lane *lane = blk->lanes; lane; lane = next) {
		next = lane->next;
		free(lane);
	}
	for (uint32_t i = 0; i < blk->sync_fd_count; i++)
		close(blk->sync_fds[i]);
	free(blk->sync_fds);
}
