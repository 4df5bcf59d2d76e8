/*
 * The doorbells of a queue in its worker's poll set. One that is added or taken away while the queue is at work leaves
 * the queue attached: a device never hears of it. Worker thread only.
 */
#include "worker/worker.h"

bool worker_doorbell_leaves(const struct virtqueue *vq, uint32_t kind)
{
	return vq->detaching || load_relaxed(&vq->fault) || (vq->ringing && vq->ringing->doorbell == kind);
}

static int doorbell_add(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	int rc = vq->doorbell_fds[kind] >= 0 ? w->reactor->add_doorbell(w, vq, kind) : 0;

	if (rc == 0 && vq->doorbell_fds[kind] >= 0)
		vq->doorbells_armed |= 1u << kind;
	return rc;
}

/* The old eventfd is out of the poll set: it is read for the last time and closed, and the new one takes its place. */
static void doorbell_replace(struct worker *w, struct virtqueue *vq)
{
	struct worker_command *command = vq->ringing;
	int rc;

	virtqueue_take_kicks(vq);
	/* Whoever changes a doorbell may have rung one that nobody looked at: the ring is looked at once. */
	vq->kicked = true;
	vq->ringing = NULL;
	rc = virtqueue_set_doorbell(vq, command->doorbell, command->fd);
	if (rc == 0 && !vq->detaching) {
		rc = doorbell_add(w, vq, command->doorbell);
		if (rc < 0)
			vq->doorbell_fds[command->doorbell] = -1; /* refused: it is still the caller's */
	}
	worker_acknowledge(w, command, rc);
}

void worker_change_doorbell(struct worker *w, struct virtqueue *vq, struct worker_command *command)
{
	int rc = command->fd >= 0 ? eventfd_check(command->fd) : 0;

	/* The kick fd starts and stops the queue. */
	if (command->doorbell == DOORBELL_KICK || command->doorbell >= DOORBELL_KINDS || vq->ringing)
		rc = -EINVAL;
	if (rc < 0) {
		worker_acknowledge(w, command, rc);
		return;
	}
	vq->ringing = command;
	if (vq->doorbells_armed & 1u << command->doorbell)
		w->reactor->remove_doorbell(w, vq, command->doorbell);
	else
		doorbell_replace(w, vq);
}

void worker_doorbell_removed(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	vq->doorbells_armed &= ~(1u << kind);
	if (vq->ringing && vq->ringing->doorbell == kind)
		doorbell_replace(w, vq);
}

void worker_remove_doorbells(struct worker *w, struct virtqueue *vq)
{
	for (uint32_t kind = 0; kind < DOORBELL_KINDS; kind++)
		if (vq->doorbells_armed & 1u << kind)
			w->reactor->remove_doorbell(w, vq, kind);
}

int worker_add_doorbells(struct worker *w, struct virtqueue *vq)
{
	for (uint32_t kind = 0; kind < DOORBELL_KINDS; kind++) {
		int rc = doorbell_add(w, vq, kind);

		if (rc < 0) {
			worker_remove_doorbells(w, vq);
			return rc;
		}
	}
	return 0;
}
