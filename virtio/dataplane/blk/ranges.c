/*
 * Where the host's blocks are larger than the guest's, writes to different blocks of the guest's may have to change
 * one block of the host's. So each write, discard and write-zeroes claims the host's blocks that it touches, and waits
 * for those before it that claimed any of them: first come, first served, whichever worker drives its queue.
 *
 * A request counts the earlier ones that it overlaps; each of those that ends takes one off. One that has waited goes
 * back to its own worker under the mutex. There it has to take the mutex to end, and its queue stays until it has
 * ended, so the worker lives as long as it is called here.
 *
 * Disks without such blocks (all but direct I/O on a host of larger blocks) never come here.
 */
#include "blk/blk.h"

static bool overlap(const struct blk_range *a, const struct blk_range *b)
{
	return a->first < b->end && b->first < a->end;
}

static struct request *request_of(struct blk_range *range)
{
	return (struct request *)((uint8_t *)range - offsetof(struct request, range));
}

/* With the mutex. */
static void remove_range(struct blk_device *blk, struct blk_range *range)
{
	if (range->previous)
		range->previous->next = range->next;
	else
		blk->ranges.oldest = range->next;
	if (range->next)
		range->next->previous = range->previous;
	else
		blk->ranges.newest = range->previous;
	/* Whatever overlaps it came after it: an earlier one would have kept it from beginning. */
	for (struct blk_range *other = range->next; other; other = other->next)
		if (overlap(range, other) && --other->before == 0)
			request_hand_over(request_of(other));
	range->claimed = false;
}

/* True: the range is r's. False: blk_range_granted is called on r's worker when it is. */
bool blk_range_claim(struct blk_device *blk, struct request *r, uint64_t first, uint64_t end)
{
	struct blk_range *range = &r->range;
	bool granted;

	range->first = first;
	range->end = end;
	range->before = 0;
	range->claimed = true;
	range->next = NULL;
	pthread_mutex_lock(&blk->ranges.mutex);
	for (struct blk_range *other = blk->ranges.oldest; other; other = other->next)
		range->before += overlap(range, other);
	range->previous = blk->ranges.newest;
	if (range->previous)
		range->previous->next = range;
	else
		blk->ranges.oldest = range;
	blk->ranges.newest = range;
	granted = range->before == 0;
	pthread_mutex_unlock(&blk->ranges.mutex);
	return granted;
}

void blk_range_release(struct blk_device *blk, struct request *r)
{
	pthread_mutex_lock(&blk->ranges.mutex);
	remove_range(blk, &r->range);
	pthread_mutex_unlock(&blk->ranges.mutex);
}

struct request *blk_range_withdraw(struct blk_device *blk, const struct virtqueue *vq)
{
	struct request *list = NULL;

	pthread_mutex_lock(&blk->ranges.mutex);
	/* The newest first, so that none of them is granted what another one lets go of. */
	for (struct blk_range *range = blk->ranges.newest, *previous; range; range = previous) {
		struct request *r = request_of(range);

		previous = range->previous;
		if (r->vq != vq || range->before == 0)
			continue;
		remove_range(blk, range);
		r->next = list;
		list = r;
	}
	pthread_mutex_unlock(&blk->ranges.mutex);
	return list;
}
