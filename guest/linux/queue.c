// SPDX-License-Identifier: GPL-2.0
/*
 * The table of queues, and the life of a queue's hypercall doorbell: armed, refused, waiting, armed again.
 */
#include <linux/bitmap.h>
#include <linux/device.h>
#include <linux/hash.h>
#include <linux/jiffies.h>
#include <linux/lockdep.h>
#include <linux/minmax.h>
#include <linux/moduleparam.h>
#include <linux/rcupdate.h>
#include <linux/string.h>

#include "hyperbell.h"

#define HB_PROBES 16	/* entries that a queue may be in, from its hash on */

static unsigned int rearm_ms = 10 * 1000;
module_param(rearm_ms, uint, 0644);
MODULE_PARM_DESC(rearm_ms, "after a refused hypercall, try again this many milliseconds later (default 10000)");

static unsigned int rearm_max_ms = 10 * 60 * 1000;
module_param(rearm_max_ms, uint, 0644);
MODULE_PARM_DESC(rearm_max_ms, "refused again, wait twice as long, but at most this (default 600000)");

DEFINE_MUTEX(hb_queues_lock);
struct hb_queue hb_queues[HB_QUEUES];

static struct hb_queue *hb_queue_place(const struct virtqueue *vq, unsigned int probe)
{
	return &hb_queues[(hash_ptr(vq, HB_QUEUES_SHIFT) + probe) % HB_QUEUES];
}

/*
 * hb_queue_find - the entry of a queue, or NULL
 *
 * Called by kicks with preemption disabled, and by the worker. Memory is used again: an entry whose queue is not
 * the same in every respect is not this queue's.
 */
struct hb_queue notrace *hb_queue_find(const struct virtqueue *vq)
{
	unsigned int probe;

	for (probe = 0; probe < HB_PROBES; probe++) {
		struct hb_queue *queue = hb_queue_place(vq, probe);

		if (smp_load_acquire(&queue->vq) != vq)	/* pairs with hb_queue_claim() */
			continue;
		if (queue->vdev != vq->vdev || queue->index != vq->index || queue->priv != vq->priv)
			return NULL;
		return queue;
	}
	return NULL;
}

/*
 * hb_queue_claim - the entry of a queue, made if there is none; NULL if its places are taken
 *
 * A queue without an entry rings its plain doorbell.
 */
struct hb_queue *hb_queue_claim(struct virtqueue *vq)
{
	struct hb_queue *queue = hb_queue_find(vq);
	unsigned int probe;

	lockdep_assert_held(&hb_queues_lock);
	if (queue)
		return queue;
	for (probe = 0; probe < HB_PROBES; probe++) {
		queue = hb_queue_place(vq, probe);
		if (READ_ONCE(queue->vq) == vq)		/* a queue that has gone lay at the same address */
			WRITE_ONCE(queue->vq, NULL);
		if (queue->used)
			continue;
		queue->used = true;
		queue->vdev = vq->vdev;
		queue->priv = vq->priv;
		queue->index = vq->index;
		strscpy(queue->device, dev_name(&vq->vdev->dev), sizeof(queue->device));
		smp_store_release(&queue->vq, vq);	/* pairs with hb_queue_find() */
		return queue;
	}
	return NULL;
}

static void hb_queue_arm(struct hb_queue *queue)
{
	queue->rung = atomic64_read(&queue->hypercall);
	atomic_set_release(&queue->state, HB_ARMED);
}

/*
 * A refusal may be for a while only: the device was reset, the host took its offer back. Try later, and ever later,
 * unless it has rung since the last time.
 */
static void hb_queue_wait(struct hb_queue *queue)
{
	unsigned int first = max(READ_ONCE(rearm_ms), 1U);
	unsigned int longest = max(READ_ONCE(rearm_max_ms), first);
	s64 rung = atomic64_read(&queue->hypercall);

	if (!queue->delay_ms || rung != queue->rung)
		queue->delay_ms = first;
	else
		queue->delay_ms = min_t(u64, 2ULL * queue->delay_ms, longest);
	queue->rung = rung;
	queue->due = jiffies + msecs_to_jiffies(queue->delay_ms);
	atomic_set(&queue->state, HB_WAITING);
}

/*
 * hb_queue_settle - decide what the queue does from now on
 * @bell: its bell number, 0: it has none, or may not use it
 *
 * One that had a bell may get it back, and nobody says when: a virtio-mmio device that takes back its offer shows no
 * bell until it offers again. So it is looked at again as if a hypercall had been refused once more.
 */
void hb_queue_settle(struct hb_queue *queue, u32 bell)
{
	lockdep_assert_held(&hb_queues_lock);
	queue->bell = bell;
	if (bell)
		WRITE_ONCE(queue->id, bell ^ hb_platform_key());
	switch (atomic_read(&queue->state)) {
	case HB_PLAIN:
		if (bell)
			hb_queue_arm(queue);
		break;
	case HB_ARMED:
		if (!bell)
			hb_queue_wait(queue);
		break;
	case HB_REFUSED:
		hb_queue_wait(queue);
		break;
	case HB_WAITING:
		if (time_before(jiffies, queue->due))
			break;
		if (bell)
			hb_queue_arm(queue);
		else
			hb_queue_wait(queue);
		break;
	}
}

/*
 * hb_queues_hurry - the queues that wait are due now, and have never waited
 */
void hb_queues_hurry(void)
{
	unsigned int i;

	lockdep_assert_held(&hb_queues_lock);
	for (i = 0; i < HB_QUEUES; i++) {
		struct hb_queue *queue = &hb_queues[i];
		int state = atomic_read(&queue->state);

		if (!queue->used || (state != HB_REFUSED && state != HB_WAITING))
			continue;
		queue->delay_ms = 0;
		queue->due = jiffies;
		atomic_set(&queue->state, HB_WAITING);
	}
}

/*
 * hb_queues_disarm - the key is another one, or gone: all ids are void, and all queues as if never armed
 */
void hb_queues_disarm(void)
{
	unsigned int i;

	lockdep_assert_held(&hb_queues_lock);
	for (i = 0; i < HB_QUEUES; i++) {
		atomic_set(&hb_queues[i].state, HB_PLAIN);
		hb_queues[i].bell = 0;
		hb_queues[i].delay_ms = 0;
	}
}

/*
 * hb_queues_forget - the device is being set up anew, or has gone
 *
 * Takes no lock: the device may be one that somebody is waiting for.
 */
void hb_queues_forget(const struct virtio_device *vdev)
{
	unsigned int i;

	for (i = 0; i < HB_QUEUES; i++)
		if (READ_ONCE(hb_queues[i].vq) && READ_ONCE(hb_queues[i].vdev) == vdev)
			WRITE_ONCE(hb_queues[i].vq, NULL);
}

/*
 * hb_queues_sweep - forget the queues that a complete scan has not met
 */
void hb_queues_sweep(unsigned long seen)
{
	unsigned int i;

	lockdep_assert_held(&hb_queues_lock);
	for (i = 0; i < HB_QUEUES; i++)
		if (hb_queues[i].used && hb_queues[i].seen != seen)
			WRITE_ONCE(hb_queues[i].vq, NULL);
}

/*
 * hb_queues_reclaim - let the places of forgotten queues be used again
 */
void hb_queues_reclaim(void)
{
	static DECLARE_BITMAP(gone, HB_QUEUES);
	unsigned int i;

	lockdep_assert_held(&hb_queues_lock);
	bitmap_zero(gone, HB_QUEUES);
	for (i = 0; i < HB_QUEUES; i++)
		if (hb_queues[i].used && !READ_ONCE(hb_queues[i].vq))
			__set_bit(i, gone);
	if (bitmap_empty(gone, HB_QUEUES))
		return;
	synchronize_rcu();	/* a kick that found the entry before may still look at it */
	for_each_set_bit(i, gone, HB_QUEUES)
		memset(&hb_queues[i], 0, sizeof(hb_queues[i]));
}

/*
 * hb_queues_next - jiffies until the next queue is to be looked at again; MAX_JIFFY_OFFSET: none waits
 */
unsigned long hb_queues_next(void)
{
	unsigned long next = MAX_JIFFY_OFFSET;
	unsigned int i;

	lockdep_assert_held(&hb_queues_lock);
	for (i = 0; i < HB_QUEUES; i++) {
		long left;

		if (!READ_ONCE(hb_queues[i].vq) || atomic_read(&hb_queues[i].state) != HB_WAITING)
			continue;
		left = (long)(hb_queues[i].due - jiffies);
		next = min(next, (unsigned long)max(left, 0L));
	}
	return next;
}
