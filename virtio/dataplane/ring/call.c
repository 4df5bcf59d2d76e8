/* What a queue signals: its call fd, and whether the driver wants to hear; its error fd. */
#include "ring/notify.h"
#include "ring/virtqueue.h"

#include <unistd.h>

static int notifier_replace(int *slot, uint8_t *kind, int fd)
{
	int rc = fd < 0 ? 0 : notify_kind(fd);

	if (rc < 0)
		return rc;
	fd_replace(slot, fd);
	*kind = (uint8_t)rc;
	return 0;
}

/* The peer has gone, or is about to bring another one: no fault of the driver's, and its requests are served. */
static void call_lost(struct virtqueue *vq, int rc)
{
	close(vq->call_fd);
	vq->call_fd = -1;
	stat_add(&vq->stats.notifications_lost, 1);
	store_release(&vq->call_error, (uint32_t)-rc);
	virtqueue_raise_event(vq);
}

int virtqueue_set_call(struct virtqueue *vq, int fd)
{
	int kind = fd < 0 ? 0 : notify_kind(fd), rc = 0;

	if (kind < 0)
		return kind;
	if (fd >= 0) {
		if (kind == NOTIFY_EVENTFD && notify_would_wait(fd))
			return DP_E_KEPT_FULL;
		/* Completions may have come before the fd was set, so a new one is signalled once. */
		if (vq->interrupt_status)
			interrupt_status_raise(vq->interrupt_status, INTERRUPT_USED_BUFFER);
		rc = notify(fd, (uint32_t)kind);
		if (rc == -EINTR) /* it was filled up in between */
			return DP_E_KEPT_FULL;
	}
	fd_replace(&vq->call_fd, fd);
	vq->call_kind = (uint8_t)kind;
	store_release(&vq->call_error, 0);
	if (rc < 0)
		call_lost(vq, rc);
	return 0;
}

int virtqueue_set_err(struct virtqueue *vq, int fd)
{
	return notifier_replace(&vq->err_fd, &vq->err_kind, fd);
}

void virtqueue_signal(struct virtqueue *vq)
{
	int rc;

	if (vq->call_fd < 0)
		return;
	if (vq->interrupt_status)
		interrupt_status_raise(vq->interrupt_status, INTERRUPT_USED_BUFFER);
	rc = notify(vq->call_fd, vq->call_kind);
	if (likely(rc == 0))
		return;
	if (rc != -EINTR) {
		call_lost(vq, rc);
		return;
	}
	close(vq->call_fd);
	vq->call_fd = -1;
	virtqueue_fail(vq, VQ_FAULT_CALL_FD, 0, 0, 0);
}

void virtqueue_notify(struct virtqueue *vq)
{
	if (unlikely(!vq->ring_table || load_relaxed(&vq->fault)))
		return;
	if (!vq->unsaid) /* all of it was notified of before: without EVENT_IDX the driver would be interrupted twice */
		return;
	vq->unsaid = false;
	if (!vq->ops->needs_notify(vq)) {
		stat_add(&vq->stats.notifications_suppressed, 1);
		return;
	}
	stat_add(&vq->stats.notifications_sent, 1);
	virtqueue_signal(vq);
}

void virtqueue_set_interrupt_status(struct virtqueue *vq, struct interrupt_status *status)
{
	interrupt_status_ref(status);
	interrupt_status_unref(vq->interrupt_status);
	vq->interrupt_status = status;
}
