/* Drives virtio-blk queues as a guest's driver does: keeps `depth` requests in flight and times each. */

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "frontend.h"

#define SPINS_PER_CLOCK 256 /* empty looks at the rings between two looks at the clock */
#define WATCH_STEP_NS 100000000ull

static uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

int run_fail(struct run *r, const struct fe_queue *q, int code, uint64_t detail)
{
	r->fault->queue_index = q->setup.queue_index;
	r->fault->in_flight = q->in_flight;
	r->fault->avail_idx = q->avail_idx;
	r->fault->last_used = q->last_used;
	if (q->setup.packed) {
		r->fault->avail_idx |= (uint32_t)q->avail_wrap << 15;
		r->fault->last_used |= (uint32_t)q->used_wrap << 15;
	}
	r->fault->used_idx = q->ops->published(q);
	r->fault->kick_wish = q->ops->kick_wish(q);
	r->fault->detail = detail;
	return code;
}

static int has_more(const struct fe_queue *q, const struct run *r)
{
	return r->now < r->deadline && (!r->job->requests || q->submitted < r->job->requests);
}

/* Fill the queue up to the depth and kick once, if the device wants it. */
static int fill(struct fe_queue *q, struct run *r)
{
	const uint64_t one = 1;

	if (!has_more(q, r) || q->in_flight >= r->job->depth)
		return 0;
	while (q->in_flight < r->job->depth && has_more(q, r))
		request_submit(q, r->job, r->now);
	if (!q->ops->kick_needed(q)) {
		q->result->kicks_suppressed++;
		return 0;
	}
	q->result->kicks++;
	/* EAGAIN: the counter is full, so the device has a kick to read already */
	if (write(q->setup.kick_fd, &one, sizeof(one)) < 0 && errno != EAGAIN)
		return -errno;
	return 0;
}

/* Take what came back and submit as much again; returns how many, or a code. */
static int turn(struct fe_queue *q, struct run *r)
{
	uint32_t id = 0, len;
	int rc, done = 0;

	q->ops->disable_calls(q);
	while ((rc = q->ops->get(q, &id, &len)) > 0) {
		if (!done++)
			r->now = clock_ns();
		rc = request_finish(q, r, id, len);
		if (rc < 0)
			return rc;
	}
	if (rc < 0)
		return run_fail(r, q, rc, id);
	if (done)
		rc = fill(q, r);
	return rc < 0 ? run_fail(r, q, rc, 0) : done;
}

static void drain_call_fd(struct fe_queue *q)
{
	uint64_t value;

	if (read(q->setup.call_fd, &value, sizeof(value)) == sizeof(value))
		q->result->calls += value;
}

static int fail_stalled(struct run *r)
{
	struct fe_queue *stuck = r->queues[0];

	for (uint32_t i = 0; i < r->count; i++) {
		struct fe_queue *q = r->queues[i];

		if (!q->in_flight)
			continue;
		if (r->job->sleep && !q->ops->enable_calls(q))
			return run_fail(r, q, FE_E_LOST_CALL, 0);
		stuck = q;
	}
	return run_fail(r, stuck, FE_E_STALLED, 0);
}

/*
 * Whether nothing came back for too long. What passes between two looks counts for one step at most: a front-end
 * that did not run for seconds itself must not blame the device.
 */
static int is_stalled(struct run *r)
{
	uint64_t now = clock_ns(), step = now - r->looked;

	if (r->looked < r->now) { /* something came back since */
		r->waited = 0;
		step = now - r->now;
	}
	r->waited += step < WATCH_STEP_NS ? step : WATCH_STEP_NS;
	r->looked = now;
	return r->waited > r->job->stall_ns;
}

/* All queues are armed or done: sleep until a call fd is written. */
static int wait_for_calls(struct run *r)
{
	struct pollfd fds[FE_QUEUES_MAX];
	struct fe_queue *waiting[FE_QUEUES_MAX];
	uint32_t n = 0;
	int rc;

	for (uint32_t i = 0; i < r->count; i++) {
		if (!r->queues[i]->in_flight)
			continue;
		fds[n].fd = r->queues[i]->setup.call_fd;
		fds[n].events = POLLIN;
		waiting[n++] = r->queues[i];
	}
	rc = poll(fds, n, WATCH_STEP_NS / 1000000);
	if (rc < 0 && errno != EINTR)
		return -errno;
	if (!rc && is_stalled(r))
		return fail_stalled(r);
	for (uint32_t i = 0; rc > 0 && i < n; i++) {
		if (!(fds[i].revents & POLLIN))
			continue;
		drain_call_fd(waiting[i]);
		waiting[i]->armed = 0;
		waiting[i]->result->interrupts++;
		rc = turn(waiting[i], r);
		if (rc < 0)
			return rc;
		waiting[i]->result->empty_interrupts += !rc;
		rc = 1;
	}
	return 0;
}

static int run_sleeping(struct run *r)
{
	for (;;) {
		uint32_t busy = 0, ready = 0;
		int rc;

		for (uint32_t i = 0; i < r->count; i++) {
			struct fe_queue *q = r->queues[i];

			if (!q->in_flight)
				continue;
			busy++;
			if (!q->armed)
				q->armed = q->ops->enable_calls(q);
			if (q->armed)
				continue;
			ready++;
			rc = turn(q, r);
			if (rc < 0)
				return rc;
		}
		if (!busy)
			return 0;
		if (ready)
			continue;
		rc = wait_for_calls(r);
		if (rc < 0)
			return rc;
	}
}

static int run_polling(struct run *r)
{
	uint64_t spins = 0;

	for (;;) {
		uint32_t busy = 0;
		int done = 0;

		for (uint32_t i = 0; i < r->count; i++) {
			struct fe_queue *q = r->queues[i];
			int rc;

			if (!q->in_flight)
				continue;
			busy++;
			rc = turn(q, r);
			if (rc < 0)
				return rc;
			done += rc;
		}
		if (!busy)
			return 0;
		if (done) {
			spins = 0;
			continue;
		}
		if (++spins % SPINS_PER_CLOCK == 0 && is_stalled(r))
			return fail_stalled(r);
#if defined(__x86_64__)
		__builtin_ia32_pause();
#endif
	}
}

static int begin(struct fe_queue *q, const struct fe_job *job, uint32_t place, uint32_t count)
{
	if (job->depth > q->slots || q->in_flight || job->request_bytes > q->setup.request_max)
		return -EINVAL;
	q->submitted = 0;
	q->blocks = job->blocks / count;
	q->first_block = job->first_block + place * q->blocks;
	q->next_block = 0;
	q->random = (job->choice_seed + q->setup.queue_index) * 0x9E3779B97F4A7C15ull | 1;
	q->armed = 0;
	free(q->busy);
	q->busy = NULL;
	if (q->blocks < job->depth)
		return -EINVAL;
	if (!job->write_percent)
		return 0;
	q->busy = calloc(q->blocks, 1);
	return q->busy ? 0 : -ENOMEM;
}

int fe_run(struct fe_queue **queues, uint32_t count, const struct fe_job *job, struct fe_result *results,
	   struct fe_fault *fault)
{
	struct run r = { .job = job, .queues = queues, .count = count, .deadline = UINT64_MAX, .fault = fault };
	int rc = 0;

	memset(results, 0, count * sizeof(*results));
	memset(fault, 0, sizeof(*fault));
	if (!count || count > FE_QUEUES_MAX || (!job->duration_ns && !job->requests) ||
	    ((job->write_percent || job->verify) && !job->generations))
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++) {
		queues[i]->result = &results[i];
		rc = begin(queues[i], job, i, count);
		if (rc < 0)
			return rc;
		drain_call_fd(queues[i]); /* a call from before says nothing about this run */
		results[i].calls = 0;
		queues[i]->ops->disable_calls(queues[i]);
	}
	r.start = r.now = r.looked = clock_ns();
	if (job->duration_ns)
		r.deadline = r.start + job->duration_ns;
	for (uint32_t i = 0; i < count; i++) {
		rc = fill(queues[i], &r);
		if (rc < 0)
			return run_fail(&r, queues[i], rc, 0);
	}
	rc = job->sleep ? run_sleeping(&r) : run_polling(&r);
	for (uint32_t i = 0; i < count; i++) {
		drain_call_fd(queues[i]);
		if (job->duration_ns && (!job->requests || results[i].requests < job->requests))
			results[i].elapsed_ns = job->duration_ns;
	}
	return rc;
}
