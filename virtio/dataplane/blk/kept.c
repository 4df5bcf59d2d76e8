/*
 * Disks with on_error = "stop". A request that the storage fails is kept, neither answered nor lost, and the disk is
 * stopped: every request that comes after it waits. The failed ones are tried again when Python says so. When all of
 * those have succeeded the disk continues, and what waited is begun.
 *
 * Kept requests are in one list of the disk, under a mutex that only a disk with a failure takes. A request goes back to
 * its own worker under the mutex, and has to take the mutex there, so its queue and its worker live until it was handed
 * over. A flush that fails is never kept: a second try would succeed, and what the first one lost would stay lost.
 */
#include "blk/blk.h"

static struct blk_device *device_of(const struct request *r)
{
	return (struct blk_device *)r->device;
}

/* Not what says that this request cannot be: no repair and no room would change the answer. */
static bool worth_keeping(int error)
{
	switch (error) {
	case EINVAL:
	case EOPNOTSUPP:
	case ENOSYS:
	case EFAULT:
	case EBADF:
		return false;
	default:
		return true;
	}
}

/* ---- with the mutex ---- */

static void append(struct blk_device *blk, struct request *r, uint8_t why)
{
	r->kept = why;
	r->next = NULL;
	*blk->kept.last = r;
	blk->kept.last = &r->next;
	store_relaxed(&blk->errors.kept, blk->errors.kept + 1);
}

/* Take the requests that are kept for this reason (0: any) off the list, of this queue (NULL: any), in order. */
static struct request *take(struct blk_device *blk, uint8_t why, const struct virtqueue *vq)
{
	struct request *taken = NULL, **last = &taken, **at = &blk->kept.first, *r;
	uint32_t count = 0;

	while ((r = *at)) {
		if ((why && r->kept != why) || (vq && r->vq != vq)) {
			at = &r->next;
			continue;
		}
		*at = r->next;
		r->next = NULL;
		*last = r;
		last = &r->next;
		count++;
	}
	blk->kept.last = at;
	store_relaxed(&blk->errors.kept, blk->errors.kept - count);
	return taken;
}

static uint32_t kept_of(const struct blk_device *blk, const struct virtqueue *vq)
{
	uint32_t count = 0;

	for (const struct request *r = blk->kept.first; r; r = r->next)
		count += r->vq == vq;
	return count;
}

static bool any_failed(const struct blk_device *blk)
{
	for (const struct request *r = blk->kept.first; r; r = r->next)
		if (r->kept == BLK_KEPT_FAILED)
			return true;
	return false;
}

static void hand_over(struct request *r)
{
	for (struct request *next; r; r = next) {
		next = r->next;
		request_hand_over(r);
	}
}

static void go_on(struct blk_device *blk)
{
	store_relaxed(&blk->errors.stopped, 0);
	hand_over(take(blk, 0, NULL));
}

/* ---- worker threads ---- */

bool blk_keep(struct request *r, int error)
{
	struct blk_device *blk = device_of(r);

	if (!blk->setup.stop_on_error || !worth_keeping(error) || load_relaxed(&r->vq->fault))
		return false;
	pthread_mutex_lock(&blk->kept.mutex);
	if (r->tried) {
		r->tried = false;
		blk->kept.trying--;
	}
	append(blk, r, BLK_KEPT_FAILED);
	if (!load_relaxed(&blk->errors.stopped)) {
		store_relaxed(&blk->errors.stop_op, r->op);
		store_relaxed(&blk->errors.stop_error, (uint32_t)error);
		store_release(&blk->errors.stopped, 1);
	}
	pthread_mutex_unlock(&blk->kept.mutex);
	blk_raise_news(blk);
	return true;
}

bool blk_waits(struct request *r)
{
	struct blk_device *blk = device_of(r);
	bool stopped;

	pthread_mutex_lock(&blk->kept.mutex);
	stopped = load_relaxed(&blk->errors.stopped);
	if (stopped)
		append(blk, r, BLK_KEPT_WAITING);
	pthread_mutex_unlock(&blk->kept.mutex);
	return stopped;
}

void blk_keep_waiting(struct blk_device *blk, struct request *list)
{
	pthread_mutex_lock(&blk->kept.mutex);
	for (struct request *next; list; list = next) {
		next = list->next;
		append(blk, list, BLK_KEPT_WAITING);
	}
	pthread_mutex_unlock(&blk->kept.mutex);
}

void blk_tried(struct request *r)
{
	struct blk_device *blk = device_of(r);

	pthread_mutex_lock(&blk->kept.mutex);
	r->tried = false;
	if (--blk->kept.trying == 0 && !any_failed(blk))
		go_on(blk);
	pthread_mutex_unlock(&blk->kept.mutex);
	blk_raise_news(blk);
}

struct request *blk_take_kept(struct blk_device *blk, const struct virtqueue *vq)
{
	struct request *list = NULL;
	uint32_t count;

	pthread_mutex_lock(&blk->kept.mutex);
	count = kept_of(blk, vq);
	if (count && count == vq->inflight)
		list = take(blk, 0, vq);
	pthread_mutex_unlock(&blk->kept.mutex);
	return list;
}

/* ---- any thread ---- */

void blk_retry(struct native_device *device)
{
	struct blk_device *blk = (struct blk_device *)device;
	struct request *failed;

	pthread_mutex_lock(&blk->kept.mutex);
	if (load_relaxed(&blk->errors.stopped) && !blk->kept.trying) {
		store_relaxed(&blk->errors.retries, blk->errors.retries + 1);
		failed = take(blk, BLK_KEPT_FAILED, NULL);
		for (struct request *r = failed; r; r = r->next) {
			r->tried = true;
			blk->kept.trying++;
		}
		if (failed)
			hand_over(failed);
		else
			go_on(blk);
	}
	pthread_mutex_unlock(&blk->kept.mutex);
	blk_raise_news(blk);
}
