/*
 * Threads for I/O that blocks, where there is no io_uring to wait for it. Each device has its own, a few: an image that
 * hangs holds up its own requests and nothing else. They begin when there is work for them, and end when there is none.
 */
#include "worker/worker.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#define LANE_THREADS 8
#define IDLE_SECONDS 5

struct io_lane { /* of one device; the worker thread makes and ends it, `lock` is for the rest */
	struct io_lane *next;
	const struct native_device *device; /* to compare with only: it may be gone while its lane is idle */
	struct io_threads *pool;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct request *first, **last; /* no thread has taken them yet */
	uint32_t waiting, threads, idle;
	bool ending;
};

struct io_threads {
	struct worker *worker;
	struct io_lane *lanes;
	struct request *done; /* atomic stack: threads push, the worker takes it whole */
};

int io_perform(const struct request *r)
{
	ssize_t n;

	do {
		switch (r->io) {
		case IO_READ:
			n = preadv2(r->fd, r->io_iov, (int)request_pieces(r), (off_t)r->offset, r->flags);
			break;
		case IO_WRITE:
			n = pwritev2(r->fd, r->io_iov, (int)request_pieces(r), (off_t)r->offset, r->flags);
			break;
		case IO_FSYNC:
			n = fdatasync(r->fd);
			break;
		default:
			n = fallocate(r->fd, r->flags, (off_t)r->offset, (off_t)r->length);
			break;
		}
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : (int)n;
}

struct request *io_threads_done(struct io_threads *pool)
{
	return requests_take(&pool->done);
}

/* With the lane locked: the next request, or NULL when this thread is not needed any more. */
static struct request *next_request(struct io_lane *lane)
{
	struct request *r;
	struct timespec until;
	int rc = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += IDLE_SECONDS;
	while (!lane->first && !lane->ending && rc != ETIMEDOUT) {
		lane->idle++;
		rc = pthread_cond_timedwait(&lane->changed, &lane->lock, &until);
		lane->idle--;
	}
	r = lane->first;
	if (!r)
		return NULL;
	lane->first = r->next;
	if (!lane->first)
		lane->last = &lane->first;
	lane->waiting--;
	return r;
}

static void *lane_main(void *argument)
{
	struct io_lane *lane = argument;
	struct request *r;

	pthread_setname_np(pthread_self(), "hb-io");
	pthread_mutex_lock(&lane->lock);
	while ((r = next_request(lane))) {
		pthread_mutex_unlock(&lane->lock);
		r->result = io_perform(r);
		requests_push(&lane->pool->done, r);
		pthread_mutex_lock(&lane->lock);
	}
	lane->threads--;
	pthread_cond_broadcast(&lane->changed);
	pthread_mutex_unlock(&lane->lock);
	return NULL;
}

/* With the lane locked. */
static void thread_begin(struct io_lane *lane)
{
	pthread_attr_t attributes;
	sigset_t all, old;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	if (pthread_create(&thread, &attributes, lane_main, lane) == 0)
		lane->threads++;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attributes);
}

static struct io_lane *lane_of(struct io_threads *pool, const struct native_device *device)
{
	pthread_condattr_t attributes;
	struct io_lane *lane;

	for (lane = pool->lanes; lane; lane = lane->next)
		if (lane->device == device)
			return lane;
	lane = calloc(1, sizeof(*lane));
	if (!lane)
		return NULL;
	lane->device = device;
	lane->pool = pool;
	lane->last = &lane->first;
	pthread_mutex_init(&lane->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&lane->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	lane->next = pool->lanes;
	pool->lanes = lane;
	return lane;
}

void io_threads_submit(struct io_threads *pool, struct request *r)
{
	struct io_lane *lane = lane_of(pool, r->device);
	bool taken = false;

	if (lane) {
		pthread_mutex_lock(&lane->lock);
		if (lane->waiting >= lane->idle && lane->threads < LANE_THREADS)
			thread_begin(lane);
		taken = lane->threads > 0;
		if (taken) {
			r->next = NULL;
			*lane->last = r;
			lane->last = &r->next;
			lane->waiting++;
			pthread_cond_signal(&lane->changed);
		}
		pthread_mutex_unlock(&lane->lock);
	}
	if (!taken) { /* no thread and no memory to be had: better slow than not at all */
		r->result = io_perform(r);
		requests_push(&pool->done, r);
	}
}

struct io_threads *io_threads_new(struct worker *w)
{
	struct io_threads *pool = calloc(1, sizeof(*pool));

	if (pool)
		pool->worker = w;
	return pool;
}

void io_threads_free(struct io_threads *pool)
{
	struct io_lane *next;

	for (struct io_lane *lane = pool->lanes; lane; lane = next) {
		next = lane->next;
		pthread_mutex_lock(&lane->lock);
		lane->ending = true;
		pthread_cond_broadcast(&lane->changed);
		while (lane->threads)
			pthread_cond_wait(&lane->changed, &lane->lock);
		pthread_mutex_unlock(&lane->lock);
		pthread_cond_destroy(&lane->changed);
		pthread_mutex_destroy(&lane->lock);
		free(lane);
	}
	free(pool);
}
