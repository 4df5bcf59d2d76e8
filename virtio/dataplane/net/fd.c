/*
 * Back ends behind a descriptor: a tap device with its virtio header kept, so that offloads are passed on, and a
 * datagram socket with one bare frame a message.
 */
#include "net/net.h"

#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define SEND_PIECES_MAX 1024 /* IOV_MAX */
#define RECEIVE_TRIES 16     /* messages that are no frames, before others have their turn */

static bool not_now(struct net_pair *pair)
{
	pair->source.ready &= ~(uint32_t)POLLOUT;
	return false;
}

/* What became of a send that returned `n`. */
static bool sent(struct net_pair *pair, ssize_t n)
{
	if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS))
		return not_now(pair);
	if (n < 0)
		stat_add(&pair->counters.dropped, 1); /* the tap is down, nobody is at the other end, ... */
	return true;
}

static bool tap_send(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct net_header header = frame->header;
	struct iovec iov[SEND_PIECES_MAX];

	(void)w;
	if (frame->count >= SEND_PIECES_MAX) {
		stat_add(&pair->counters.dropped, 1);
		return true;
	}
	iov[0] = (struct iovec){ &header, NET_HEADER_SIZE };
	memcpy(&iov[1], frame->iov, frame->count * sizeof(iov[0]));
	return sent(pair, writev(pair->source.fd, iov, (int)frame->count + 1));
}

static uint32_t nothing_more(struct net_pair *pair)
{
	pair->source.ready &= ~(uint32_t)POLLIN;
	return 0;
}

static uint32_t tap_receive(struct net_pair *pair, struct net_header *header)
{
	struct iovec iov[2] = { { header, NET_HEADER_SIZE }, { pair->frame, NET_FRAME_MAX } };

	for (int tries = 0; tries < NET_TURN; tries++) {
		ssize_t n = readv(pair->source.fd, iov, 2);

		if (n <= 0)
			return nothing_more(pair);
		/* The kernel is honest, but a program may hold the other end, and what lies would be read past the frame. */
		if (n >= NET_HEADER_SIZE + ETHERNET_SIZE && net_header_plausible(header, (uint32_t)n - NET_HEADER_SIZE))
			return (uint32_t)n - NET_HEADER_SIZE;
		stat_add(&pair->counters.misreceived, 1);
	}
	return 0; /* enough for now; it stays ready */
}

static void tap_select(struct net_pair *pair, bool selected)
{
	struct ifreq request = { .ifr_flags = selected ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE };

	/* Where the kernel refuses, it goes on with what it had: frames for a queue nobody drives wait there. */
	(void)!ioctl(pair->source.fd, TUNSETQUEUE, &request);
}

static bool datagram_send(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct msghdr message = { .msg_iov = (struct iovec *)(uintptr_t)frame->iov, .msg_iovlen = frame->count };

	(void)w;
	if (frame->count > SEND_PIECES_MAX) {
		stat_add(&pair->counters.dropped, 1);
		return true;
	}
	return sent(pair, sendmsg(pair->source.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL));
}

/* An empty message, unlike the end of a connection, says nothing about what comes after it. */
static bool has_ended(int fd)
{
	socklen_t size = sizeof(int);
	int type = SOCK_SEQPACKET;

	return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0 || type != SOCK_DGRAM;
}

static uint32_t datagram_receive(struct net_pair *pair, struct net_header *header)
{
	memset(header, 0, sizeof(*header));
	for (int tries = 0; tries < RECEIVE_TRIES; tries++) {
		ssize_t n = recv(pair->source.fd, pair->frame, NET_FRAME_MAX, MSG_DONTWAIT | MSG_TRUNC);

		if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
			continue; /* told once: what was sent found nobody, or whoever was there has gone */
		if (n < 0 || (n == 0 && has_ended(pair->source.fd)))
			return nothing_more(pair);
		if (n >= ETHERNET_SIZE && n <= NET_FRAME_MAX)
			return (uint32_t)n;
		/* No frame at all, or one that was cut: the peer's affair, and lost. */
		stat_add(&pair->counters.misreceived, 1);
	}
	return 0; /* enough for now; it stays ready */
}

const struct net_backend net_tap_backend = { .send = tap_send, .receive = tap_receive, .select = tap_select };
const struct net_backend net_datagram_backend = { .send = datagram_send, .receive = datagram_receive };
