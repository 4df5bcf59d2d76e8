/*
 * The reactor where io_uring is forbidden (containers, some distributions): epoll for the kicks, threads with plain
 * system calls for the I/O. Each request passes from one thread to another and back, so this is slower.
 */
#include "worker/worker.h"

#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define EVENTS_A_TURN 64

struct reactor_state {
	int epoll_fd;
	uint32_t sources;
	struct io_threads *threads;
	struct request *done; /* linked by `next`: their I/O is over, their devices have not heard of it */
};

/* What an event belongs to: a virtqueue, a source (its address with this bit), or NULL for the wake-up eventfd. */
#define SOURCE_BIT 1u

static int watch(struct worker *w, int fd, uint32_t events, void *what)
{
	struct epoll_event event = { .events = events, .data.ptr = what };

	return epoll_ctl(w->state->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static int epoll_open(struct worker *w)
{
	int rc;

	w->state = calloc(1, sizeof(*w->state));
	if (!w->state)
		return -ENOMEM;
	w->state->threads = io_threads_new(w);
	if (!w->state->threads) {
		free(w->state);
		return -ENOMEM;
	}
	w->state->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	rc = w->state->epoll_fd < 0 ? -errno : watch(w, w->wake_fd, EPOLLIN, NULL);
	if (rc < 0) {
		if (w->state->epoll_fd >= 0)
			close(w->state->epoll_fd);
		io_threads_free(w->state->threads);
		free(w->state);
	}
	return rc;
}

static void epoll_close(struct worker *w)
{
	io_threads_free(w->state->threads);
	close(w->state->epoll_fd);
	free(w->state);
}

static int epoll_add_doorbell(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	return watch(w, vq->doorbell_fds[kind], EPOLLIN, vq);
}

static void epoll_remove_doorbell(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	epoll_ctl(w->state->epoll_fd, EPOLL_CTL_DEL, vq->doorbell_fds[kind], NULL);
	worker_doorbell_removed(w, vq, kind);
}

static int epoll_add_source(struct worker *w, struct source *source)
{
	int rc = watch(w, source->fd, source->events | EPOLLET, (uint8_t *)source + SOURCE_BIT);

	if (rc == 0)
		w->state->sources++;
	return rc;
}

static void epoll_remove_source(struct worker *w, struct source *source)
{
	epoll_ctl(w->state->epoll_fd, EPOLL_CTL_DEL, source->fd, NULL);
	w->state->sources--;
	source_removed(w, source);
}

static void epoll_submit(struct worker *w, struct request *r)
{
	io_threads_submit(w->state->threads, r);
}

static bool complete_done(struct worker *w)
{
	struct reactor_state *state = w->state;
	bool any;

	if (!state->done)
		state->done = io_threads_done(state->threads);
	any = state->done != NULL;
	w->moved = 0;
	while (state->done && w->moved < WORKER_TURN_BYTES) {
		struct request *r = state->done;

		state->done = r->next;
		r->device->ops->io_done(r, r->result);
	}
	return any;
}

static bool epoll_turn(struct worker *w, uint64_t timeout_ns)
{
	struct epoll_event events[EVENTS_A_TURN];
	int timeout_ms = timeout_ns == WAIT_FOREVER ? -1 : (int)((timeout_ns + 999999) / 1000000), n;
	bool any = complete_done(w);

	/*
	 * While it polls the worker sees the rings themselves; the kernel is only asked where it may also wait, or for
	 * what is not in a ring.
	 */
	if ((timeout_ns == 0 && !w->state->sources) || any)
		return any;
	n = epoll_wait(w->state->epoll_fd, events, EVENTS_A_TURN, timeout_ms);
	for (int i = 0; i < n; i++) {
		uint64_t count;

		if (events[i].data.u64 & SOURCE_BIT)
			source_rang((struct source *)((uint8_t *)events[i].data.ptr - SOURCE_BIT), events[i].events);
		else if (events[i].data.ptr)
			worker_kicked(events[i].data.ptr);
		else if (read(w->wake_fd, &count, sizeof(count)) < 0)
			continue;
	}
	return n > 0;
}

const struct reactor_ops epoll_ops = {
	.open = epoll_open,
	.close = epoll_close,
	.add_doorbell = epoll_add_doorbell,
	.remove_doorbell = epoll_remove_doorbell,
	.add_source = epoll_add_source,
	.remove_source = epoll_remove_source,
	.submit = epoll_submit,
	.turn = epoll_turn,
};
