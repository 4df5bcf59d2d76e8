/*
 * Descriptors that came from a peer: checked when they are taken, read without blocking, written with a bound.
 *
 * What rings a queue is an eventfd. What the queue signals may also be a pipe or a Unix socket, for front-ends that
 * wait with SIGIO, which eventfds do not send (User-mode Linux). O_NONBLOCK is shared with the peer, so it is neither
 * set nor relied upon.
 *
 * A call eventfd may be blocking, and the peer can fill it up and leave it full. A plain write is by far the cheapest
 * signal, so it is bounded instead: while a thread signals, a timer of its own sends it SIGRTMIN+5 every 2 ms, and a
 * write that sits in the kernel then ends with EINTR. The timer stops itself when the thread has not signalled for a
 * whole tick, so an idle thread costs nothing.
 */
#include "dataplane.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TICK_NS 2000000
#define ONES_MAX 4096      /* kicks in a row that counted 1, after which an eventfd is asked for more */
#define COUNTDOWN_MAX 1024 /* how often it may have one more at once: a semaphore's count is a number of wake-ups */
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

/* 0, or -errno; -EINTR when the peer keeps the eventfd full. */
static int eventfd_signal_bounded(int fd)
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

/*
 * 8 bytes go into a pipe, and into a Unix socket, whole or not at all (pipe(7), unix(7)): a stream of them stays one.
 * SIGPIPE does not come: Python ignores it, and a worker's thread has every signal blocked.
 */
static int pipe_signal(int fd)
{
	uint64_t one = 1;
	struct iovec iov = { &one, sizeof(one) };

	if (pwritev2(fd, &iov, 1, -1, RWF_NOWAIT) == sizeof(one))
		return 0;
	if (errno != EOPNOTSUPP)
		return errno == EAGAIN ? 0 : -errno;
	/* A FIFO, or a kernel before 6.4. Should the peer fill it up between these two, the timer ends the write. */
	return is_writable(fd) && eventfd_signal_bounded(fd) == -EPIPE ? -EPIPE : 0;
}

static int socket_signal(int fd)
{
	uint64_t one = 1;

	if (send(fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		return 0;
	return errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM ? 0 : -errno;
}

int notify(int fd, uint32_t kind)
{
	if (likely(kind == NOTIFY_EVENTFD))
		return eventfd_signal_bounded(fd);
	return kind == NOTIFY_PIPE ? pipe_signal(fd) : socket_signal(fd);
}

int notify_kind(int fd)
{
	int rc = eventfd_check(fd), flags, domain = 0;
	socklen_t size = sizeof(domain);

	if (rc != DP_E_NOT_EVENTFD)
		return rc < 0 ? rc : NOTIFY_EVENTFD;
	flags = fcntl(fd, F_GETFL);
	if (flags < 0)
		return -errno;
	/* No fstat: a file's may have to wait for the process or the host that serves its file system. */
	if (fcntl(fd, F_GETPIPE_SZ) > 0 && (flags & O_ACCMODE) != O_RDONLY)
		return NOTIFY_PIPE;
	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX)
		return NOTIFY_SOCKET;
	return DP_E_NOT_NOTIFIER;
}

static void fd_replace(int *slot, int fd)
{
	if (*slot >= 0)
		close(*slot);
	*slot = fd;
}

/* Would a signal of ours wait for the peer? */
static bool kept_full(int fd)
{
	return !is_writable(fd) && !(fcntl(fd, F_GETFL) & O_NONBLOCK);
}

static int notifier_replace(int *slot, uint8_t *kind, int fd)
{
	int rc = fd < 0 ? 0 : notify_kind(fd);

	if (rc < 0)
		return rc;
	fd_replace(slot, fd);
	*kind = (uint8_t)rc;
	return 0;
}

int virtqueue_set_doorbell(struct virtqueue *vq, uint32_t kind, int fd)
{
	int rc = kind >= DOORBELL_KINDS ? -EINVAL : fd < 0 ? 0 : eventfd_check(fd);

	if (rc == 0)
		fd_replace(&vq->doorbell_fds[kind], fd);
	return rc;
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
		if (kind == NOTIFY_EVENTFD && kept_full(fd))
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
