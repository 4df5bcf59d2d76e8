/*
 * What a worker does: drive the queues of native devices, with one reactor (io_uring or epoll).
 *
 * The round: take commands, serve each queue that has work (a bounded turn each), take completions, publish and
 * notify once a queue. When a round finds nothing the worker polls for a while (adaptive, bounded), then arms the
 * kicks, looks once more and sleeps. It never calls Python: it answers commands through a list and an eventfd.
 */
#include "worker/worker.h"

#define POLL_MIN_NS 4000          /* the window starts here when it grows again from nothing */
#define KICKLESS_SLEEP_NS 200000  /* a queue without a kick fd is looked at this often while it is idle */

/* ---- queues ---- */

static const struct queue_ops *queue_ops(const struct virtqueue *vq)
{
	return vq->device->ops->queue;
}

static bool queue_ready(struct virtqueue *vq)
{
	if (vq->unfinished)
		return true;
	return queue_ops(vq) ? queue_ops(vq)->ready(vq->device, vq) : virtqueue_has_work(vq);
}

static uint32_t serve_chains(struct worker *w, struct virtqueue *vq)
{
	struct chain_view chain = { .iov = w->scratch };
	uint64_t turn_ns = 0, start_ns = 0, batch_ns = 0;
	uint32_t served = 0;
	int rc = VQ_CHAIN;

	if (vq->unfinished) {
		if (vq->device->ops->proceed(vq->unfinished)) {
			vq->unfinished = NULL;
			guest_wait_end(vq, false, w->clock_ns);
		}
		return 1;
	}
	w->moved = 0;
	guest_wait_begin(vq, w->looked_ns);
	while (served < WORKER_TURN && requests_left(vq) && (rc = virtqueue_pop(vq, &chain)) == VQ_CHAIN) {
		int64_t written;

		guest_wait_popped(vq);
		if (served++ == 0)
			turn_ns = start_ns = batch_ns = now_ns();
		written = vq->device->ops->serve(vq->device, w, vq, &chain, start_ns);
		if (written == SERVE_BROKEN) {
			/* Only off the books: a broken ring is not written to, but a stop waits for what is in flight. */
			virtqueue_push(vq, chain.head, chain.slots, 0);
			break;
		}
		if (written >= 0) {
			virtqueue_push(vq, chain.head, chain.slots, (uint32_t)written);
			start_ns = now_ns();
			guest_wait_complete(vq, vq->wait.available_ns, start_ns);
			worker_touch(w, vq);
			if (start_ns - batch_ns >= WORKER_BATCH_NS) {
				virtqueue_publish(vq);
				virtqueue_notify(vq);
				batch_ns = start_ns;
			} else if (served % 16 == 0) {
				virtqueue_publish(vq); /* a driver that polls may go on with what is done */
			}
			if (start_ns - turn_ns >= w->turn_ns)
				break;
		} else if (++w->started >= WORKER_ROUND_STARTS || w->moved >= WORKER_TURN_BYTES || vq->unfinished) {
			break;
		}
	}
	if (served)
		worker_clock(w, start_ns);
	guest_wait_end(vq, rc == VQ_EMPTY, w->clock_ns);
	return served;
}

static bool serve_queue(struct worker *w, struct virtqueue *vq)
{
	bool served = queue_ops(vq) ? queue_ops(vq)->turn(vq->device, w, vq) : serve_chains(w, vq) > 0;

	/* A turn may end with the chain whose memory had gone. The ring is zeroes now, and would look empty for ever. */
	if (served && virtqueue_runnable(vq))
		virtqueue_memory_alive(vq);
	if (vq->kicked) {
		/* A queue that now waits for a translation was not called in vain. */
		if (virtqueue_take_kicks(vq) && !served && !vq->parked)
			stat_add(&vq->stats.empty_wakeups, 1);
		vq->kicked = false;
		/* Nothing rings a broken queue: its eventfd may be one that is readable for ever. */
		if (unlikely(load_relaxed(&vq->fault)))
			worker_remove_doorbells(w, vq);
	}
	return served;
}

/* The next round begins behind `last`. */
static void turn_queues(struct worker *w, struct virtqueue *last)
{
	struct virtqueue **end = &last->worker_next, *first = w->queues;

	if (!*end)
		return;
	w->queues = *end;
	*end = NULL;
	for (end = &w->queues; *end; end = &(*end)->worker_next)
		;
	*end = first;
}

static bool serve_queues(struct worker *w)
{
	struct virtqueue *last = NULL; /* that could hand over as many requests as it liked */
	bool served = false;

	w->started = 0;
	worker_looks(w);
	for (struct virtqueue *vq = w->queues; vq; vq = vq->worker_next) {
		if (vq->unfinished || (!vq->detaching && (vq->kicked || queue_ready(vq))))
			served |= serve_queue(w, vq);
		if (unlikely(w->started >= WORKER_ROUND_STARTS) && !last)
			last = vq;
	}
	if (unlikely(last))
		turn_queues(w, last);
	worker_publish_touched(w);
	return served;
}

void worker_kicked(struct virtqueue *vq)
{
	vq->kicked = true;
}

static void detach_if_drained(struct worker *w, struct virtqueue *vq)
{
	struct worker_command *command = vq->detaching;
	struct virtqueue **at = &w->queues;

	if (vq->doorbells_armed || vq->ringing || vq->inflight)
		return;
	while (*at != vq)
		at = &(*at)->worker_next;
	*at = vq->worker_next;
	if (vq->doorbell_fds[DOORBELL_KICK] < 0)
		w->kickless--;
	if (queue_ops(vq))
		queue_ops(vq)->detached(vq->device, w, vq);
	native_device_unref(vq->device);
	requests_drop(vq);
	vq->device = NULL;
	vq->detaching = NULL;
	vq->kicked = false;
	worker_acknowledge(w, command, 0);
}

static int attach(struct worker *w, struct virtqueue *vq, struct native_device *device)
{
	int rc = device->ops->queue ? 0 : requests_make(vq, device);

	if (rc == 0)
		rc = worker_add_doorbells(w, vq);
	if (rc < 0) {
		requests_drop(vq);
		return rc;
	}
	if (vq->doorbell_fds[DOORBELL_KICK] < 0)
		w->kickless++;
	vq->device = native_device_ref(device);
	vq->worker_next = w->queues;
	w->queues = vq;
	guest_wait_reset(vq, now_ns());
	/* A front-end that kicked before we watched, or whose notifier is new, left its work in the ring. */
	virtqueue_disarm(vq);
	if (queue_ops(vq))
		queue_ops(vq)->attached(device, w, vq);
	return 0;
}

static bool drives(const struct worker *w, const struct virtqueue *vq)
{
	for (const struct virtqueue *mine = w->queues; mine; mine = mine->worker_next)
		if (mine == vq)
			return true;
	return false;
}

/* A queue is attached once, detached once, and changed by the worker that drives it alone. */
static bool makes_sense(const struct worker *w, const struct worker_command *command)
{
	switch (command->op) {
	case WORKER_ATTACH:
		return command->vq && command->device && !command->vq->device;
	case WORKER_DETACH:
		return drives(w, command->vq) && !command->vq->detaching;
	case WORKER_SET_MEMORY:
	case WORKER_SET_CALL:
	case WORKER_SET_ERR:
	case WORKER_SET_DOORBELL:
	case WORKER_RESUME:
		return drives(w, command->vq);
	case WORKER_NUDGE:
		return command->device;
	default:
		return command->op == WORKER_QUIT;
	}
}

static void obey(struct worker *w, struct worker_command *command)
{
	struct virtqueue *vq = command->vq;

	if (!makes_sense(w, command)) {
		worker_acknowledge(w, command, -EINVAL);
		return;
	}
	switch (command->op) {
	case WORKER_ATTACH:
		worker_acknowledge(w, command, attach(w, vq, command->device));
		break;
	case WORKER_DETACH:
		vq->detaching = command; /* acknowledged by detach_if_drained */
		worker_remove_doorbells(w, vq);
		if (queue_ops(vq))
			queue_ops(vq)->detaching(vq->device, vq);
		break;
	case WORKER_SET_MEMORY:
		virtqueue_set_memory(vq, command->table);
		worker_acknowledge(w, command, 0);
		break;
	case WORKER_SET_CALL:
		worker_acknowledge(w, command, virtqueue_set_call(vq, command->fd));
		break;
	case WORKER_SET_ERR:
		worker_acknowledge(w, command, virtqueue_set_err(vq, command->fd));
		break;
	case WORKER_SET_DOORBELL:
		worker_change_doorbell(w, vq, command);
		break;
	case WORKER_RESUME:
		virtqueue_resume(vq);
		worker_acknowledge(w, command, 0);
		break;
	case WORKER_NUDGE:
		if (command->device->ops->nudged)
			command->device->ops->nudged(command->device, w);
		worker_acknowledge(w, command, 0);
		break;
	case WORKER_QUIT:
		w->quit = command;
		break;
	}
}

static bool obey_commands(struct worker *w)
{
	struct worker_command *command, *next;

	bool any = false;

	for (command = worker_take_inbox(w); command; command = next) {
		next = command->next; /* once acknowledged the struct is Python's again */
		obey(w, command);
		any = true;
	}
	return any;
}

static void detach_drained(struct worker *w)
{
	struct virtqueue *next;

	for (struct virtqueue *vq = w->queues; vq; vq = next) {
		next = vq->worker_next;
		if (vq->detaching) {
			if (vq->device->ops->drain)
				vq->device->ops->drain(vq->device, vq);
			worker_publish_touched(w);
			detach_if_drained(w, vq);
		}
	}
}

/* ---- rounds ---- */

void worker_submit_part(struct worker *w, struct request *r)
{
	r->next = NULL;
	if (w->parts)
		*w->parts_tail = r;
	else
		w->parts = r;
	w->parts_tail = &r->next;
}

/* As much as a turn may copy, or one part; short ones (the ends of requests) as many as a round may hand over. */
static bool submit_parts(struct worker *w)
{
	uint64_t moved = 0;
	uint32_t count = 0;
	bool any = w->parts != NULL;

	while (w->parts && moved < WORKER_TURN_BYTES && count++ < WORKER_ROUND_STARTS) {
		struct request *r = w->parts;

		w->parts = r->next;
		moved += r->length < WORKER_TURN_BYTES ? r->length : WORKER_TURN_BYTES;
		w->reactor->submit(w, r);
	}
	return any;
}

bool worker_round(struct worker *w)
{
	bool busy = obey_commands(w);

	if (unlikely(load_relaxed(&w->handed)))
		busy |= worker_take_handed(w);
	busy |= serve_queues(w);
	busy |= submit_parts(w);
	busy |= w->reactor->turn(w, 0);
	worker_publish_touched(w);
	detach_drained(w);
	return busy;
}

static bool poll_for_work(struct worker *w)
{
	uint64_t now, until;

	if (w->poll_ns == 0)
		return false;
	now = now_ns();
	until = now + w->poll_ns;
	do {
		worker_clock(w, now);
		if (worker_round(w)) {
			stat_add(&w->stats.poll_hits, 1);
			return true;
		}
		cpu_relax();
		now = now_ns();
	} while (now < until);
	stat_add(&w->stats.poll_misses, 1);
	return false;
}

static bool queue_arm(struct virtqueue *vq)
{
	return queue_ops(vq) ? queue_ops(vq)->arm(vq->device, vq) : virtqueue_arm(vq);
}

static void queue_disarm(struct virtqueue *vq)
{
	if (queue_ops(vq))
		queue_ops(vq)->disarm(vq->device, vq);
	else
		virtqueue_disarm(vq);
}

static void worker_sleep(struct worker *w)
{
	uint64_t start = now_ns(), now, slept;
	bool ready = false;

	for (struct virtqueue *vq = w->queues; vq; vq = vq->worker_next)
		if (!vq->detaching && !queue_arm(vq) && (queue_ops(vq) || requests_left(vq)))
			ready = true;
	store_relaxed(&w->sleeping, 1);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!ready && !load_relaxed(&w->inbox) && !load_relaxed(&w->handed)) {
		w->reactor->turn(w, w->kickless ? KICKLESS_SLEEP_NS : WAIT_FOREVER);
		stat_add(&w->stats.wakeups, 1);
	}
	store_relaxed(&w->sleeping, 0);
	for (struct virtqueue *vq = w->queues; vq; vq = vq->worker_next)
		queue_disarm(vq);
	worker_publish_touched(w);
	detach_drained(w);
	/* Would polling have caught it? Then poll longer the next time; if it would have taken too long, less. */
	now = now_ns();
	slept = now - start;
	if (slept < w->poll_max_ns)
		w->poll_ns = w->poll_ns < POLL_MIN_NS ? POLL_MIN_NS : w->poll_ns * 2;
	else
		w->poll_ns = w->poll_ns / 2 < POLL_MIN_NS ? 0 : w->poll_ns / 2;
	if (w->poll_ns > w->poll_max_ns)
		w->poll_ns = w->poll_max_ns;
	/* Kicks woke us, so what is in the rings has just come; where there are none it came after the look before. */
	w->looking_ns = w->kickless ? start : now;
	worker_clock(w, now);
}

void worker_run(struct worker *w)
{
	while (!w->quit) {
		if (worker_round(w) || poll_for_work(w))
			continue;
		worker_sleep(w);
	}
}
