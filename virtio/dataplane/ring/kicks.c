/* What rings a queue: an eventfd for each kind of doorbell, read without blocking and never for ever. */
#include "ring/notify.h"
#include "ring/virtqueue.h"

#define ONES_MAX 4096      /* kicks in a row that counted 1, after which an eventfd is asked for more */
#define COUNTDOWN_MAX 1024 /* how often it may have one more at once: a semaphore's count is a number of wake-ups */

int virtqueue_set_doorbell(struct virtqueue *vq, uint32_t kind, int fd)
{
	int rc = kind >= DOORBELL_KINDS ? -EINVAL : fd < 0 ? 0 : eventfd_check(fd);

	if (rc == 0)
		fd_replace(&vq->doorbell_fds[kind], fd);
	return rc;
}

int virtqueue_doorbell_fd(struct virtqueue *vq, uint32_t kind)
{
	return kind < DOORBELL_KINDS ? vq->doorbell_fds[kind] : -1;
}

/*
 * An eventfd that counts down (EFD_SEMAPHORE) stays readable for as long as its peer likes: 2^64 wake-ups for nothing.
 * No other one has 1 in it again and again, each time at once.
 */
static void countdown(struct virtqueue *vq, uint32_t kind)
{
	uint64_t count = 1;
	struct iovec iov = { &count, sizeof(count) };
	uint32_t more = 0;

	if (++vq->ones[kind] < ONES_MAX)
		return;
	vq->ones[kind] = 0;
	while (more < COUNTDOWN_MAX && count == 1 &&
	       preadv2(vq->doorbell_fds[kind], &iov, 1, -1, RWF_NOWAIT) == sizeof(count))
		more++;
	stat_add(&vq->stats.kicks[kind], more);
	if (more == COUNTDOWN_MAX)
		virtqueue_fail(vq, VQ_FAULT_KICK_FD, 0, 0, 0);
}

static uint64_t doorbell_take(struct virtqueue *vq, uint32_t kind)
{
	uint64_t count = 0;
	struct iovec iov = { &count, sizeof(count) };

	/* RWF_NOWAIT: the eventfd may be a blocking one, and the peer may have read it before us. */
	if (vq->doorbell_fds[kind] < 0 || preadv2(vq->doorbell_fds[kind], &iov, 1, -1, RWF_NOWAIT) != sizeof(count))
		return 0;
	/* The count is the peer's word: it may write 2^60. A metric that jumps by 2^32 at most stays readable. */
	if (count > UINT32_MAX)
		count = UINT32_MAX;
	stat_add(&vq->stats.kicks[kind], count);
	if (count == 1)
		countdown(vq, kind);
	else
		vq->ones[kind] = 0;
	return count;
}

uint64_t virtqueue_take_kicks(struct virtqueue *vq)
{
	uint64_t count = 0;

	for (uint32_t kind = 0; kind < DOORBELL_KINDS; kind++)
		count += doorbell_take(vq, kind);
	if (count) {
		stat_add(&vq->stats.wakeups, 1);
		vq->kicked = true; /* until the queue is served: was there anything? */
	}
	return count;
}
