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
#include "ring/notify.h"

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

bool notify_would_wait(int fd)
{
	return !is_writable(fd) && !(fcntl(fd, F_GETFL) & O_NONBLOCK);
}
