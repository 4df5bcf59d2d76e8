/*
 * A network in user space for one guest: frames come and go by a socket, libslirp makes connections of this host's
 * own out of them. This is the loop around libslirp: what it waits for, its timers, its frames.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include <slirp/libslirp.h>

#include "usernet.cdef.h"

#define FRAME_MAX (14 + 8 + 65535)
#define FRAMES_A_TURN 64
#define POLLS_MAX (USERNET_SOCKETS_MAX + 2)
/* How long a guest may take none of its frames before they are dropped: its connections then wait, all of them. */
#define PATIENCE_MS 100

enum { POLL_STOP, POLL_FRAMES }; /* libslirp's own follow */

struct timer {
	struct timer *next;
	SlirpTimerCb fire;
	void *opaque;
	int64_t due_ms; /* INT64_MAX: not set */
};

struct usernet {
	struct usernet_setup setup;
	Slirp *slirp;
	struct timer *timers;
	bool jammed; /* the guest took nothing for PATIENCE_MS, and has taken nothing since */
	uint32_t poll_count;
	struct pollfd polls[POLLS_MAX];
	uint8_t frame[FRAME_MAX];
};

/* ---- what libslirp asks of us ---- */

static ssize_t send_frame(const void *frame, size_t length, void *opaque)
{
	struct usernet *net = opaque;
	struct pollfd room = { .fd = net->setup.frames_fd, .events = POLLOUT };

	for (;;) {
		if (send(net->setup.frames_fd, frame, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
			net->jammed = false;
			break;
		}
		if (errno == EINTR)
			continue;
		if ((errno != EAGAIN && errno != EWOULDBLOCK) || net->jammed)
			break;
		net->jammed = poll(&room, 1, PATIENCE_MS) == 0;
	}
	return (ssize_t)length; /* what is lost, TCP sends again */
}

static void guest_error(const char *message, void *opaque)
{
	/* Whatever a guest gets wrong is its own affair, and would fill the log. */
	(void)message;
	(void)opaque;
}

static int64_t clock_ns(void *opaque)
{
	struct timespec now;

	(void)opaque;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void *timer_new(SlirpTimerCb fire, void *fire_opaque, void *opaque)
{
	struct usernet *net = opaque;
	struct timer *timer = malloc(sizeof(*timer));

	if (!timer)
		abort(); /* as libslirp does when it has no memory */
	*timer = (struct timer){ net->timers, fire, fire_opaque, INT64_MAX };
	net->timers = timer;
	return timer;
}

static void timer_free(void *gone, void *opaque)
{
	struct usernet *net = opaque;

	for (struct timer **link = &net->timers; *link; link = &(*link)->next)
		if (*link == gone) {
			*link = (*link)->next;
			break;
		}
	free(gone);
}

static void timer_mod(void *timer, int64_t due_ms, void *opaque)
{
	(void)opaque;
	((struct timer *)timer)->due_ms = due_ms;
}

static void poll_fd_changed(int fd, void *opaque)
{
	/* All of them are asked for before each poll. */
	(void)fd;
	(void)opaque;
}

static void notified(void *opaque)
{
	/* Only ever called on this thread, which is about to poll anyway. */
	(void)opaque;
}

static const SlirpCb callbacks = {
	.send_packet = send_frame,
	.guest_error = guest_error,
	.clock_get_ns = clock_ns,
	.timer_new = timer_new,
	.timer_free = timer_free,
	.timer_mod = timer_mod,
	.register_poll_fd = poll_fd_changed,
	.unregister_poll_fd = poll_fd_changed,
	.notify = notified,
};

/* ---- the loop ---- */

static const struct {
	int slirp;
	short here;
} poll_bits[] = {
	{ SLIRP_POLL_IN, POLLIN },   { SLIRP_POLL_OUT, POLLOUT }, { SLIRP_POLL_PRI, POLLPRI },
	{ SLIRP_POLL_ERR, POLLERR }, { SLIRP_POLL_HUP, POLLHUP },
};

static int add_poll(int fd, int events, void *opaque)
{
	struct usernet *net = opaque;
	struct pollfd poll_fd = { .fd = fd };

	if (net->poll_count == POLLS_MAX)
		return -1; /* more sockets than there can be files */
	for (size_t i = 0; i < sizeof(poll_bits) / sizeof(poll_bits[0]); i++)
		if (events & poll_bits[i].slirp)
			poll_fd.events |= poll_bits[i].here;
	net->polls[net->poll_count] = poll_fd;
	return (int)net->poll_count++;
}

static int events_of(int index, void *opaque)
{
	struct usernet *net = opaque;
	int events = 0;

	if (index < 0 || (uint32_t)index >= net->poll_count)
		return 0;
	for (size_t i = 0; i < sizeof(poll_bits) / sizeof(poll_bits[0]); i++)
		if (net->polls[index].revents & poll_bits[i].here)
			events |= poll_bits[i].slirp;
	return events;
}

/* Milliseconds until the first timer is due, at most `wait` (UINT32_MAX: for ever); as poll() takes them. */
static int time_to_wait(const struct usernet *net, uint32_t wait)
{
	int64_t now = clock_ns(NULL) / 1000000, left = wait == UINT32_MAX ? INT64_MAX : wait;

	for (const struct timer *timer = net->timers; timer; timer = timer->next)
		if (timer->due_ms != INT64_MAX && timer->due_ms - now < left)
			left = timer->due_ms > now ? timer->due_ms - now : 0;
	if (left == INT64_MAX)
		return -1;
	return left < INT32_MAX ? (int)left : INT32_MAX;
}

static void fire_timers(struct usernet *net)
{
	int64_t now = clock_ns(NULL) / 1000000;
	struct timer *timer = net->timers;

	while (timer) {
		if (timer->due_ms > now) {
			timer = timer->next;
			continue;
		}
		timer->due_ms = INT64_MAX;
		timer->fire(timer->opaque);
		timer = net->timers; /* it may have made or freed some */
	}
}

static void take_frames(struct usernet *net)
{
	for (int i = 0; i < FRAMES_A_TURN; i++) {
		ssize_t length = recv(net->setup.frames_fd, net->frame, FRAME_MAX, MSG_DONTWAIT | MSG_TRUNC);

		if (length <= 0)
			return;
		if (length <= FRAME_MAX)
			slirp_input(net->slirp, net->frame, (int)length);
	}
}

int usernet_run(struct usernet *net)
{
	for (;;) {
		uint32_t wait = UINT32_MAX;
		int ready;

		net->polls[POLL_STOP] = (struct pollfd){ .fd = net->setup.stop_fd, .events = POLLIN };
		net->polls[POLL_FRAMES] = (struct pollfd){ .fd = net->setup.frames_fd, .events = POLLIN };
		net->poll_count = 2;
		slirp_pollfds_fill(net->slirp, &wait, add_poll, net);
		ready = poll(net->polls, net->poll_count, time_to_wait(net, wait));
		if (ready < 0 && errno != EINTR)
			return -errno;
		if (ready > 0 && net->polls[POLL_STOP].revents)
			return 0;
		slirp_pollfds_poll(net->slirp, ready < 0, events_of, net);
		fire_timers(net);
		take_frames(net);
	}
}

/* ---- making and ending it ---- */

struct usernet *usernet_new(const struct usernet_setup *setup)
{
	struct usernet *net = calloc(1, sizeof(*net));
	SlirpConfig config = {
		.version = 1, /* all that is needed here, whatever the library's version */
		.restricted = setup->restricted,
		.in_enabled = true,
		.vnetwork.s_addr = setup->network,
		.vnetmask.s_addr = setup->netmask,
		.vhost.s_addr = setup->host,
		.vnameserver.s_addr = setup->dns,
		.vdhcp_start.s_addr = setup->dhcp_start,
		.in6_enabled = setup->ipv6,
		.vprefix_len = 64,
		.if_mtu = setup->mtu,
		.if_mru = setup->mtu,
		.disable_host_loopback = !setup->host_loopback,
	};

	if (!net)
		return NULL;
	net->setup = *setup;
	if (setup->hostname[0])
		config.vhostname = net->setup.hostname;
	if (setup->bootfile[0])
		config.bootfile = net->setup.bootfile;
	if (setup->tftp)
		config.tftp_path = ".";
	/* The same as in QEMU's user network, so that what is known of one holds for the other. */
	inet_pton(AF_INET6, "fec0::", &config.vprefix_addr6);
	inet_pton(AF_INET6, "fec0::2", &config.vhost6);
	inet_pton(AF_INET6, "fec0::3", &config.vnameserver6);
	net->slirp = slirp_new(&config, &callbacks, net);
	if (!net->slirp) {
		free(net);
		return NULL;
	}
	return net;
}

void usernet_free(struct usernet *net)
{
	slirp_cleanup(net->slirp);
	while (net->timers)
		timer_free(net->timers, net);
	free(net);
}

int usernet_forward(struct usernet *net, uint32_t udp, uint32_t host, uint32_t host_port, uint32_t guest,
		    uint32_t guest_port)
{
	errno = 0;
	if (slirp_add_hostfwd(net->slirp, (int)udp, (struct in_addr){ host }, (int)host_port,
			      (struct in_addr){ guest }, (int)guest_port) == 0)
		return 0;
	return errno ? -errno : -EADDRNOTAVAIL;
}

const char *usernet_version(void)
{
	return slirp_version_string();
}
