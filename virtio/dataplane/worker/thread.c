/*
 * A worker's life: one pthread, pinned and named, with a reactor that it opens itself. Once its maker knows that it
 * could, it goes its rounds (worker/worker.c), and it ends when it is told to.
 */
#include "worker/worker.h"

#include "ring/notify.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

static int thread_prepare(struct worker *w)
{
	if (w->cpus && sched_setaffinity(0, w->cpus_size, w->cpus) < 0)
		return -errno;
	pthread_setname_np(pthread_self(), w->name);
	return 0;
}

static int reactor_open(struct worker *w)
{
	int rc = -ENOSYS;

	if (w->reactor_wanted != REACTOR_EPOLL) {
		w->reactor = &uring_ops;
		rc = w->reactor->open(w);
		w->stats.reactor = REACTOR_IO_URING;
		w->stats.uring_error = rc < 0 ? (uint32_t)-rc : 0;
	}
	if (rc < 0 && w->reactor_wanted != REACTOR_IO_URING) {
		w->reactor = &epoll_ops;
		rc = w->reactor->open(w);
		w->stats.reactor = REACTOR_EPOLL;
	}
	return rc;
}

static void *worker_main(void *argument)
{
	struct worker *w = argument;
	struct worker_command *starting = w->quit;
	int rc = thread_prepare(w);

	w->quit = NULL;
	if (rc == 0)
		rc = reactor_open(w);
	worker_acknowledge(w, starting, rc);
	if (rc < 0)
		return NULL;
	worker_run(w);
	w->reactor->close(w);
	eventfd_signal_thread_end();
	worker_acknowledge(w, w->quit, 0);
	return NULL;
}

static void worker_release(struct worker *w)
{
	if (w->wake_fd >= 0)
		close(w->wake_fd);
	CPU_FREE(w->cpus);
	free(w);
}

static int thread_start(struct worker *w)
{
	sigset_t all, old;
	pthread_t thread;
	int rc;

	/* Signals are for Python's main thread; faults are not maskable, and ring/notify.c unblocks its own tick. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rc = pthread_create(&thread, NULL, worker_main, w);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	w->thread = thread;
	return -rc;
}

/* A set for the largest number among them: the C library's own has room for 1024 CPUs. */
static bool keep_cpus(struct worker *w, const uint32_t *cpus, uint32_t count)
{
	uint32_t most = 0;

	if (count == 0)
		return true;
	for (uint32_t i = 0; i < count; i++)
		most = cpus[i] > most ? cpus[i] : most;
	w->cpus = CPU_ALLOC(most + 1ul);
	if (!w->cpus)
		return false;
	w->cpus_size = CPU_ALLOC_SIZE(most + 1ul);
	CPU_ZERO_S(w->cpus_size, w->cpus);
	for (uint32_t i = 0; i < count; i++)
		CPU_SET_S(cpus[i], w->cpus_size, w->cpus);
	return true;
}

struct worker *worker_new(const char *name, uint32_t reactor, uint32_t poll_us, const uint32_t *cpus,
			  uint32_t cpu_count, int done_fd, int *error)
{
	struct worker_command starting = { 0 };
	struct worker *w;

	*error = -ENOMEM;
	w = calloc(1, sizeof(*w));
	if (!w)
		return NULL;
	w->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	w->done_fd = done_fd;
	w->poll_max_ns = poll_us * 1000ull;
	w->turn_ns = WORKER_TURN_NS;
	w->poll_ns = w->poll_max_ns;
	w->reactor_wanted = reactor;
	strncpy(w->name, name, sizeof(w->name) - 1);
	if (w->wake_fd < 0) {
		*error = -errno;
		worker_release(w);
		return NULL;
	}
	if (!keep_cpus(w, cpus, cpu_count)) {
		worker_release(w);
		return NULL;
	}
	w->quit = &starting; /* the thread answers it like a command, once its reactor is open */
	*error = thread_start(w);
	if (*error == 0) {
		struct worker_command *done;

		while (!(done = worker_take_done(w)))
			sched_yield(); /* a few syscalls long, once a worker's life */
		*error = done->result;
		if (*error == 0)
			return w;
		pthread_join((pthread_t)w->thread, NULL);
	}
	worker_release(w);
	return NULL;
}

const struct worker_stats *worker_stats(struct worker *w)
{
	return &w->stats;
}

uint64_t worker_cpu_ns(struct worker *w)
{
	struct timespec t = { 0 };
	clockid_t clock;

	if (pthread_getcpuclockid((pthread_t)w->thread, &clock) == 0)
		clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void worker_free(struct worker *w)
{
	pthread_join((pthread_t)w->thread, NULL);
	worker_release(w);
}
