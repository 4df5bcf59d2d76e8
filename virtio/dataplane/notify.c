/*
 * Eventfds that came from a peer: checked when they are taken, read without blocking, written with a bound.
 *
 * A call eventfd may be blocking, and the peer can fill it up and leave it full; O_NONBLOCK is shared with the peer,
 * so setting it proves nothing. A plain write is by far the cheapest signal, so it is bounded instead: while a thread
 * signals, a timer of its own sends it SIGRTMIN+5 every 10 ms, and a write that sits in the kernel then ends with
 * EINTR. The timer stops itself when the thread has not signalled for a whole tick, so an idle thread costs nothing.
 */
#include "dataplane.h"

#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TICK_NS 10000000
#define TICK_SIGNAL (SIGRTMIN + 5)

static __thread struct {
	timer_t timer;
	volatile sig_atomic_t created, armed, used, in_write;
} tick;

static pthread_once_t handler_once = PTHREAD_ONCE_INIT;

static void tick_set(long ns)
{
	struct itimerspec every = { { 0, ns }, { 0, ns } };

	timer_settime(tick.timer, 0, &every, NULL);
}

static void on_tick(int number)
{
	int saved = errno;

	(void)number;
	if (!tick.used && !tick.in_write && tick.armed) {
		tick.armed = 0;
		tick_set(0);
	}
	tick.used = 0;
	errno = saved;
}

static void handler_install(void)
{
	struct sigaction action = { .sa_handler = on_tick }; /* no SA_RESTART: EINTR is the point */

	sigaction(TICK_SIGNAL, &action, NULL);
}

static bool tick_start(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = TICK_SIGNAL };
	sigset_t unblock;

	if (!tick.created) {
		pthread_once(&handler_once, handler_install);
		event._sigev_un._tid = (int)syscall(SYS_gettid);
		if (timer_create(CLOCK_MONOTONIC, &event, &tick.timer) < 0)
			return false;
		sigemptyset(&unblock);
		sigaddset(&unblock, TICK_SIGNAL);
		pthread_sigmask(SIG_UNBLOCK, &unblock, NULL);
		tick.created = 1;
	}
	if (!tick.armed) {
		tick.armed = 1;
		tick_set(TICK_NS);
	}
	return true;
}

void eventfd_signal_thread_end(void)
{
	if (tick.created)
		timer_delete(tick.timer);
	tick.created = tick.armed = 0;
}

/* Where no timer is to be had (RLIMIT_SIGPENDING): a signal that is lost would cost the driver more than this look. */
static bool is_writable(int fd)
{
	struct pollfd ask = { .fd = fd, .events = POLLOUT };

	return poll(&ask, 1, 0) == 1;
}

int eventfd_signal_bounded(int fd)
{
	uint64_t one = 1;
	ssize_t n;
	int error;

	tick.used = 1;
	tick.in_write = 1; /* before `armed` is looked at: from here on the tick does not stop itself */
	if (!tick.armed && !tick_start() && !is_writable(fd)) {
		tick.in_write = 0;
		return 0; /* full: as below */
	}
	n = write(fd, &one, sizeof(one));
	error = n < 0 ? errno : 0;
	tick.in_write = 0;
	/* Full and non-blocking: the peer has unread signals already, which is all a signal says. */
	return error == EAGAIN ? 0 : -error;
}

int eventfd_check(int fd)
{
	char path[32], target[32];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, target, sizeof(target) - 1);
	if (n < 0)
		return -errno;
	target[n] = 0;
	return strcmp(target, "anon_inode:[eventfd]") == 0 ? 0 : DP_E_NOT_EVENTFD;
}

static int fd_replace(int *slot, int fd)
{
	int rc = fd < 0 ? 0 : eventfd_check(fd);

	if (rc < 0)
		return rc;
	if (*slot >= 0)
		close(*slot);
	*slot = fd;
	return 0;
}

int virtqueue_set_doorbell(struct virtqueue *vq, uint32_t kind, int fd)
{
	return kind < DOORBELL_KINDS ? fd_replace(&vq->doorbell_fds[kind], fd) : -EINVAL;
}

int virtqueue_set_call(struct virtqueue *vq, int fd)
{
	int rc = fd_replace(&vq->call_fd, fd);

	/* Completions may have come before the fd was set, so a new one is signalled once. */
	if (rc == 0 && fd >= 0)
		virtqueue_signal(vq);
	return rc;
}

int virtqueue_set_err(struct virtqueue *vq, int fd)
{
	return fd_replace(&vq->err_fd, fd);
}

void virtqueue_signal(struct virtqueue *vq)
{
	if (vq->call_fd < 0)
		return;
	if (vq->interrupt_status)
		interrupt_status_raise(vq->interrupt_status, INTERRUPT_USED_BUFFER);
	if (eventfd_signal_bounded(vq->call_fd) == -EINTR) {
		close(vq->call_fd);
		vq->call_fd = -1;
		virtqueue_fail(vq, VQ_FAULT_CALL_FD, 0, 0, 0);
	}
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
