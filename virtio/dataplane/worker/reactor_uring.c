/*
 * The reactor on io_uring: doorbells by multishot poll, block I/O, the wake-up eventfd; one io_uring_enter a turn at most.
 *
 * io_uring bypasses seccomp, so the ring is created disabled, restricted to the few operations used here, and only
 * then enabled. DEFER_TASKRUN (Linux 6.1) keeps completions from interrupting the worker; it takes them when it looks.
 */
#include "worker/worker.h"

#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#ifndef SQ_ENTRIES /* tests have fewer, to run out of them */
#define SQ_ENTRIES 512
#endif
#define CQ_ENTRIES 4096
#define IO_THREADS_MAX 32768

/* What a completion belongs to, in the low bits of its user data; pointers are aligned to 8 at least. */
#define TAG_MASK 7ull
#define TAG_REQUEST 0
#define TAG_WAKE 1
#define TAG_REMOVED 2
#define TAG_SOURCE 3
#define TAG_DOORBELL 4 /* + DOORBELL_* */
_Static_assert(TAG_DOORBELL + DOORBELL_KINDS - 1 <= TAG_MASK, "a tag for each kind of doorbell");

/* So many attempts to hand over what fills the submission queue; then the rest waits for the next turn. */
#define SUBMIT_TRIES 4
/* A poll that ends with an error so often in a row, and is set up again each time, never works. */
#define POLL_ERRORS_MAX 16
#define TROUBLED_NS 1000000 /* between two turns of a worker that could not sleep: the kernel takes nothing from it */

struct control { /* a poll to set up, or one to cancel, that found no room in the submission queue */
	uint64_t user_data;
	uint32_t events;
	int fd; /* < 0: cancel */
};

struct reactor_state {
	struct io_uring ring;
	uint32_t watched;               /* doorbells and sources */
	struct control *later;          /* in order; room for a poll and a cancel of each that is watched, and the wake-up */
	uint32_t later_count, later_room;
	struct request *requests, **requests_tail; /* the same for I/O */
	uint32_t wake_errors;
};

static const uint8_t allowed_ops[] = {
	IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL, IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC,
	IORING_OP_FALLOCATE,
};

/*
 * NULL: the submission queue is full and the kernel takes nothing from it now (no memory, completions that were not
 * reaped). The caller keeps what it has for the next turn, in which completions are reaped and commands are obeyed.
 */
static struct io_uring_sqe *sqe_get(struct io_uring *ring)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

	for (int tries = 0; unlikely(!sqe) && tries < SUBMIT_TRIES; tries++) {
		io_uring_submit(ring);
		sqe = io_uring_get_sqe(ring);
	}
	return sqe;
}

static bool control_now(struct io_uring *ring, const struct control *c)
{
	struct io_uring_sqe *sqe = sqe_get(ring);

	if (unlikely(!sqe))
		return false;
	if (c->fd < 0) {
		/* A cancel, not POLL_REMOVE: that answers EALREADY, and leaves the poll, when a kick is just on its way. */
		io_uring_prep_cancel64(sqe, c->user_data, 0);
		io_uring_sqe_set_data64(sqe, TAG_REMOVED);
	} else {
		io_uring_prep_poll_multishot(sqe, c->fd, c->events);
		io_uring_sqe_set_data64(sqe, c->user_data);
	}
	return true;
}

/* In order: a poll comes before its cancel. */
static void control(struct reactor_state *state, int fd, uint32_t events, uint64_t user_data)
{
	struct control c = { user_data, events, fd };

	if (likely(!state->later_count && control_now(&state->ring, &c)))
		return;
	state->later[state->later_count++] = c;
}

/* Another doorbell or source: a poll of it and a cancel may have to wait. */
static int watch(struct reactor_state *state, int fd, uint32_t events, uint64_t user_data)
{
	uint32_t room = state->later_count + 2 * (state->watched + 1) + 1;

	if (room > state->later_room) {
		struct control *later = realloc(state->later, 2 * room * sizeof(*later));

		if (!later)
			return -ENOMEM;
		state->later = later;
		state->later_room = 2 * room;
	}
	state->watched++;
	control(state, fd, events, user_data);
	return 0;
}

/*
 * What may block goes to threads of the kernel's: by default 4 for each CPU, for all files together, so a few requests
 * of a disk that hangs would hold up every other disk. A disk has DEVICE_REQUESTS at most, and as many disks as anybody
 * has on one worker have room here. The kernel makes a thread only where there is work for it. To be called before the
 * ring is restricted, which forbids it.
 */
static int threads_allow(struct io_uring *ring)
{
	unsigned limits[2] = { IO_THREADS_MAX, 0 }; /* for files and block devices; 0: as it is */

	return io_uring_register_iowq_max_workers(ring, limits);
}

static int ring_restrict(struct io_uring *ring)
{
	struct io_uring_restriction rules[ARRAY_SIZE(allowed_ops) + 1] = { 0 };
	int rc;

	for (size_t i = 0; i < ARRAY_SIZE(allowed_ops); i++) {
		rules[i].opcode = IORING_RESTRICTION_SQE_OP;
		rules[i].sqe_op = allowed_ops[i];
	}
	rules[ARRAY_SIZE(allowed_ops)].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
	rules[ARRAY_SIZE(allowed_ops)].sqe_flags = IOSQE_ASYNC;
	rc = io_uring_register_restrictions(ring, rules, ARRAY_SIZE(rules));
	return rc < 0 ? rc : io_uring_enable_rings(ring);
}

static int uring_open(struct worker *w)
{
	struct io_uring_params params = {
		.flags = IORING_SETUP_R_DISABLED | IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER |
			 IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		.cq_entries = CQ_ENTRIES,
	};
	struct reactor_state *state = calloc(1, sizeof(*state));
	int rc;

	if (!state)
		return -ENOMEM;
	rc = io_uring_queue_init_params(SQ_ENTRIES, &state->ring, &params);
	if (rc < 0) {
		free(state);
		return rc;
	}
	rc = threads_allow(&state->ring);
	if (rc == 0)
		rc = ring_restrict(&state->ring);
	if (rc < 0) {
		io_uring_queue_exit(&state->ring);
		free(state);
		return rc;
	}
	state->later_room = 1;
	state->later = calloc(state->later_room, sizeof(*state->later));
	if (!state->later) {
		io_uring_queue_exit(&state->ring);
		free(state);
		return -ENOMEM;
	}
	state->requests_tail = &state->requests;
	w->state = state;
	control(state, w->wake_fd, POLLIN, TAG_WAKE);
	return 0;
}

static void uring_close(struct worker *w)
{
	io_uring_queue_exit(&w->state->ring);
	free(w->state->later);
	free(w->state);
}

static uint64_t doorbell_data(struct virtqueue *vq, uint32_t kind)
{
	return (uint64_t)(uintptr_t)vq | (TAG_DOORBELL + kind);
}

static int uring_add_doorbell(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	vq->poll_errors[kind] = 0;
	return watch(w->state, vq->doorbell_fds[kind], POLLIN, doorbell_data(vq, kind));
}

static void cancel(struct worker *w, uint64_t user_data)
{
	control(w->state, -1, 0, user_data);
}

static void uring_remove_doorbell(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	cancel(w, doorbell_data(vq, kind));
}

static int uring_add_source(struct worker *w, struct source *source)
{
	return watch(w->state, source->fd, source->events, (uint64_t)(uintptr_t)source | TAG_SOURCE);
}

static void uring_remove_source(struct worker *w, struct source *source)
{
	cancel(w, (uint64_t)(uintptr_t)source | TAG_SOURCE);
}

static bool submit_now(struct io_uring *ring, const struct request *r)
{
	struct io_uring_sqe *sqe = sqe_get(ring);

	if (unlikely(!sqe))
		return false;
	switch (r->io) {
	case IO_READ:
		io_uring_prep_readv2(sqe, r->fd, r->io_iov, request_pieces(r), r->offset, r->flags);
		break;
	case IO_WRITE:
		io_uring_prep_writev2(sqe, r->fd, r->io_iov, request_pieces(r), r->offset, r->flags);
		break;
	case IO_FSYNC:
		io_uring_prep_fsync(sqe, r->fd, IORING_FSYNC_DATASYNC);
		break;
	case IO_FALLOCATE:
		io_uring_prep_fallocate(sqe, r->fd, r->flags, (off_t)r->offset, (off_t)r->length);
		break;
	}
	/*
	 * To a thread of the kernel's at once. Without this the kernel tries on ours: of a file that can be polled (FUSE) it
	 * believes that this cannot block.
	 */
	if (r->may_block && (r->io == IO_READ || r->io == IO_WRITE))
		sqe->flags |= IOSQE_ASYNC;
	io_uring_sqe_set_data64(sqe, (uint64_t)(uintptr_t)r);
	return true;
}

static void uring_submit(struct worker *w, struct request *r)
{
	struct reactor_state *state = w->state;

	if (likely(!state->requests && submit_now(&state->ring, r)))
		return;
	r->next = NULL;
	*state->requests_tail = r;
	state->requests_tail = &r->next;
}

/* What found no room before. */
static void submit_later(struct reactor_state *state)
{
	uint32_t done = 0;

	while (done < state->later_count && control_now(&state->ring, &state->later[done]))
		done++;
	state->later_count -= done;
	memmove(state->later, state->later + done, state->later_count * sizeof(*state->later));
	while (!state->later_count && state->requests && submit_now(&state->ring, state->requests)) {
		state->requests = state->requests->next;
		if (!state->requests)
			state->requests_tail = &state->requests;
	}
}

static void wake_drain(struct worker *w)
{
	uint64_t count;

	if (read(w->wake_fd, &count, sizeof(count)) < 0)
		return; /* non-blocking: somebody's wake-up was taken with an earlier one */
}

static void doorbell_rang(struct worker *w, const struct io_uring_cqe *cqe, bool last)
{
	struct virtqueue *vq = (struct virtqueue *)(uintptr_t)(cqe->user_data & ~TAG_MASK);
	uint32_t kind = (uint32_t)(cqe->user_data & TAG_MASK) - TAG_DOORBELL;

	if (likely(cqe->res >= 0)) {
		vq->poll_errors[kind] = 0;
		worker_kicked(vq);
	}
	if (!last)
		return;
	/* A multishot poll may end by itself, say when the completion queue was full: set it up again. */
	if (cqe->res < 0 && cqe->res != -ECANCELED && ++vq->poll_errors[kind] == POLL_ERRORS_MAX)
		virtqueue_fail(vq, VQ_FAULT_KICK_POLL, 0, 0, (uint64_t)-cqe->res);
	if (worker_doorbell_leaves(vq, kind)) {
		w->state->watched--;
		worker_doorbell_removed(w, vq, kind);
	} else {
		control(w->state, vq->doorbell_fds[kind], POLLIN, cqe->user_data);
	}
}

static void source_completed(struct worker *w, const struct io_uring_cqe *cqe, bool last)
{
	struct source *source = (struct source *)(uintptr_t)(cqe->user_data & ~TAG_MASK);

	if (cqe->res > 0)
		source_rang(source, (uint32_t)cqe->res);
	else if (cqe->res < 0 && cqe->res != -ECANCELED)
		source->wanted = false; /* nothing that can be waited for */
	if (last) {
		w->state->watched--;
		source_removed(w, source);
	}
}

static void complete(struct worker *w, const struct io_uring_cqe *cqe)
{
	uint64_t data = cqe->user_data;
	bool last = !(cqe->flags & IORING_CQE_F_MORE);
	struct request *r;

	switch (data & TAG_MASK) {
	case TAG_REQUEST:
		r = (struct request *)(uintptr_t)data;
		r->device->ops->io_done(r, cqe->res);
		break;
	case TAG_WAKE:
		wake_drain(w);
		w->state->wake_errors = cqe->res < 0 ? w->state->wake_errors + 1 : 0;
		if (last)
			control(w->state, w->wake_fd, POLLIN, TAG_WAKE);
		break;
	case TAG_SOURCE:
		source_completed(w, cqe, last);
		break;
	case TAG_REMOVED: /* what counts is the end of the poll itself */
		break;
	default:
		doorbell_rang(w, cqe, last);
		break;
	}
}

static void nap(void)
{
	struct timespec time = { .tv_nsec = TROUBLED_NS };

	nanosleep(&time, NULL);
}

static bool uring_turn(struct worker *w, uint64_t timeout_ns)
{
	struct io_uring *ring = &w->state->ring;
	struct __kernel_timespec timeout = { .tv_sec = (long long)(timeout_ns / 1000000000u),
					     .tv_nsec = (long long)(timeout_ns % 1000000000u) };
	struct __kernel_timespec troubled = { .tv_nsec = TROUBLED_NS };
	struct io_uring_cqe *cqe;
	unsigned head, seen = 0; /* what is not seen yet stays there for the next turn */
	bool later = w->state->later_count || w->state->requests;
	int rc = 0;

	if (unlikely(later)) {
		submit_later(w->state);
		later = w->state->later_count || w->state->requests;
	}
	if (timeout_ns == WAIT_FOREVER && likely(!later))
		rc = io_uring_submit_and_wait(ring, 1);
	else if (timeout_ns)
		rc = io_uring_submit_and_wait_timeout(ring, &cqe, 1, later ? &troubled : &timeout, NULL);
	else if (io_uring_sq_ready(ring))
		io_uring_submit_and_get_events(ring);
	else if (IO_URING_READ_ONCE(*ring->sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW))
		io_uring_get_events(ring);
	w->moved = 0;
	io_uring_for_each_cqe(ring, head, cqe) {
		seen++;
		complete(w, cqe);
		if (unlikely(w->moved >= WORKER_TURN_BYTES))
			break;
	}
	io_uring_cq_advance(ring, seen);
	/* It could not sleep, and would look again at once, for as long as the kernel takes nothing. */
	if (unlikely((rc < 0 && rc != -EINTR && rc != -ETIME && !seen) || w->state->wake_errors >= POLL_ERRORS_MAX))
		nap();
	return seen > 0;
}

const struct reactor_ops uring_ops = {
	.open = uring_open,
	.close = uring_close,
	.add_doorbell = uring_add_doorbell,
	.remove_doorbell = uring_remove_doorbell,
	.add_source = uring_add_source,
	.remove_source = uring_remove_source,
	.submit = uring_submit,
	.turn = uring_turn,
};
