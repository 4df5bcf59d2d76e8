/*
 * What a sender left undone and a receiver did not offer to do: checksums and segmentation, in software. Guests with
 * different drivers can then talk through the switch; between two Linux guests nothing here runs.
 */
#include "net/net.h"

#include <arpa/inet.h>
#include <net/ethernet.h>
#include <netinet/in.h>

#define IP4_MIN 20
#define IP6_SIZE 40
#define TCP_MIN 20
#define UDP_SIZE 8
#define TCP_FIN 0x01
#define TCP_PSH 0x08
#define TCP_CWR 0x80
#define HEADERS_MAX 512 /* Ethernet to TCP: what an honest sender never exceeds */

/* ---- checksums, RFC 1071 ---- */

static uint32_t sum_bytes(uint32_t sum, const uint8_t *bytes, uint32_t length)
{
	uint64_t wide = sum;
	uint16_t word;

	for (; length >= 2; length -= 2, bytes += 2) {
		memcpy(&word, bytes, 2);
		wide += word;
	}
	if (length) {
		word = 0;
		memcpy(&word, bytes, 1);
		wide += word;
	}
	while (wide >> 32)
		wide = (wide & UINT32_MAX) + (wide >> 32);
	return (uint32_t)wide;
}

static uint16_t sum_fold(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

static void write16(uint8_t *at, uint32_t value)
{
	uint16_t wire = htons((uint16_t)value);

	memcpy(at, &wire, 2);
}

/* ---- how long a packet may be ---- */

/* 5.1.4.1: with VIRTIO_NET_F_MTU no packet is longer than that, the header of the link not counted. */
static bool exceeds_mtu(const struct net_device *net, uint32_t packet)
{
	uint32_t mtu = load_relaxed(&net->mtu);

	return unlikely(mtu && packet > mtu) && net_has(net, VIRTIO_NET_F_MTU);
}

/* A frame that is to arrive as it is, not in segments. */
static bool is_oversized(const struct net_device *net, const struct net_frame *frame)
{
	struct pieces from = pieces_of(frame->iov, frame->count);
	uint8_t bytes[ETHERNET_SIZE + 8];
	uint32_t length;
	uint16_t type;

	if (!exceeds_mtu(net, frame->length - ETHERNET_SIZE))
		return false;
	length = (uint32_t)pieces_read(&from, bytes, sizeof(bytes));
	return exceeds_mtu(net, frame->length - net_network_offset(bytes, length, &type));
}

/* ---- where the headers of a frame that is to be segmented lie ---- */

struct headers {
	bool ip6, udp;
	uint32_t network;   /* offsets in the frame */
	uint32_t transport;
	uint32_t payload;
};

/* False: not what its header claims, or longer than any honest sender makes it: `bytes` are HEADERS_MAX at most. */
static bool headers_find(const struct net_frame *frame, const uint8_t *bytes, struct headers *h)
{
	uint8_t type = frame->header.gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
	uint16_t ether_type;

	h->network = net_network_offset(bytes, frame->length, &ether_type);
	h->transport = frame->header.csum_start;
	h->ip6 = ether_type == ETHERTYPE_IPV6;
	h->udp = type == VIRTIO_NET_HDR_GSO_UDP_L4;
	if (!h->ip6 && ether_type != ETHERTYPE_IP)
		return false;
	if ((type == VIRTIO_NET_HDR_GSO_TCPV4 && h->ip6) || (type == VIRTIO_NET_HDR_GSO_TCPV6 && !h->ip6))
		return false;
	if (h->transport < h->network + (h->ip6 ? IP6_SIZE : IP4_MIN) ||
	    h->transport + (h->udp ? UDP_SIZE : TCP_MIN) > frame->length || h->transport + TCP_MIN > HEADERS_MAX)
		return false;
	/* 5.1.6.2: the checksum is the transport's own. */
	if (frame->header.csum_offset != (h->udp ? 6 : 16))
		return false;
	h->payload = h->transport + (h->udp ? UDP_SIZE : (bytes[h->transport + 12] >> 4) * 4u);
	if (!h->udp && h->payload < h->transport + TCP_MIN)
		return false;
	return h->payload < frame->length && h->payload <= HEADERS_MAX;
}

static uint32_t pseudo_header_sum(const struct headers *h, const uint8_t *bytes, uint32_t transport_length)
{
	const uint8_t *ip = bytes + h->network;
	uint32_t sum = h->ip6 ? sum_bytes(0, ip + 8, 32) : sum_bytes(0, ip + 12, 8);

	return sum + htons((uint16_t)transport_length) + htons(h->udp ? IPPROTO_UDP : IPPROTO_TCP);
}

/* Make the copied headers those of segment `number`: `length` bytes of payload that begin `offset` into the whole. */
static void headers_adjust(const struct headers *h, uint8_t *headers, const uint8_t *payload, uint32_t number,
			   uint32_t offset, uint32_t length, bool last)
{
	uint8_t *ip = headers + h->network, *transport = headers + h->transport;
	uint32_t transport_length = h->payload - h->transport + length, sum, sequence;
	uint8_t *checksum = transport + (h->udp ? 6 : 16);

	if (h->ip6) {
		write16(ip + 4, h->payload - h->network - IP6_SIZE + length);
	} else {
		write16(ip + 2, h->payload - h->network + length);
		write16(ip + 4, net_read16(ip + 4) + number);
		write16(ip + 10, 0);
		sum = sum_fold(sum_bytes(0, ip, h->transport - h->network));
		memcpy(ip + 10, &(uint16_t){ (uint16_t)sum }, 2);
	}
	if (h->udp) {
		write16(transport + 4, transport_length);
	} else {
		memcpy(&sequence, transport + 4, 4);
		sequence = htonl(ntohl(sequence) + offset);
		memcpy(transport + 4, &sequence, 4);
		if (!last)
			transport[13] &= (uint8_t)~(TCP_FIN | TCP_PSH);
		if (number)
			transport[13] &= (uint8_t)~TCP_CWR; /* RFC 3168: only once */
	}
	memset(checksum, 0, 2);
	sum = pseudo_header_sum(h, headers, transport_length);
	sum = sum_bytes(sum, transport, h->payload - h->transport);
	/* The payload's words pair up as in memory: the headers before it have an even length. */
	sum = sum_fold(sum_bytes(sum, payload, length));
	if (h->udp && sum == 0)
		sum = 0xffff; /* RFC 768: 0 would say that there is none */
	memcpy(checksum, &(uint16_t){ (uint16_t)sum }, 2);
}

/* There is something to write to: what is not worth looking for buffers is not worth copying either. */
static bool has_buffers(const struct net_pair *pair)
{
	return pair->rx && !pair->rx->detaching && (pair->held.count || virtqueue_has_work(pair->rx));
}

static enum net_result segment(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct pieces from = pieces_of(frame->iov, frame->count);
	/* A copy of ours: what is checked and summed is what is delivered. */
	uint8_t *bytes = pair->work;
	uint8_t headers[HEADERS_MAX];
	struct headers h;
	uint32_t payload, largest, done = 0;

	pieces_read(&from, bytes, HEADERS_MAX);
	if (!headers_find(frame, bytes, &h))
		return NET_MALFORMED;
	payload = frame->length - h.payload;
	largest = payload < frame->header.gso_size ? payload : frame->header.gso_size;
	if (exceeds_mtu(pair->net, h.payload - h.network + largest) || payload / largest > NET_SEGMENTS_MAX)
		return NET_REFUSED;
	if (!has_buffers(pair))
		return NET_NO_BUFFERS;
	pieces_read(&from, bytes + HEADERS_MAX, NET_FRAME_MAX - HEADERS_MAX);
	for (uint32_t number = 0; done < payload; number++) {
		uint32_t length = payload - done < frame->header.gso_size ? payload - done : frame->header.gso_size;
		struct iovec iov[2] = { { headers, h.payload }, { bytes + h.payload + done, length } };
		struct net_frame piece = { .iov = iov, .count = 2, .length = h.payload + length };
		enum net_result result;

		memcpy(headers, bytes, h.payload);
		headers_adjust(&h, headers, bytes + h.payload + done, number, done, length, done + length == payload);
		result = net_frame_write(pair, w, &piece);
		if (result == NET_NO_BUFFERS && done) {
			stat_add(&pair->counters.no_buffers, 1);
			return NET_DELIVERED; /* as much as there will be: the transport sends the rest again */
		}
		if (result != NET_DELIVERED)
			return result;
		done += length;
	}
	return NET_DELIVERED;
}

static enum net_result complete_checksum(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct pieces from = pieces_of(frame->iov, frame->count);
	uint8_t *bytes = pair->work; /* a copy of ours, as above */
	uint32_t start = frame->header.csum_start;
	struct iovec iov = { bytes, frame->length };
	struct net_frame whole = { .iov = &iov, .count = 1, .length = frame->length };
	uint16_t sum;

	if (!has_buffers(pair))
		return NET_NO_BUFFERS;
	pieces_read(&from, bytes, frame->length);
	sum = sum_fold(sum_bytes(0, bytes + start, frame->length - start));
	/* 5.1.6.2: the driver left the pseudo header's sum in the field. 0 and 0xffff are the same to all but UDP. */
	if (sum == 0)
		sum = 0xffff;
	memcpy(bytes + start + frame->header.csum_offset, &sum, 2);
	return net_frame_write(pair, w, &whole);
}

static bool receiver_segments(const struct net_device *net, uint8_t gso_type)
{
	if (gso_type & VIRTIO_NET_HDR_GSO_ECN && !net_has(net, VIRTIO_NET_F_GUEST_ECN))
		return false;
	switch (gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
	case VIRTIO_NET_HDR_GSO_NONE: return true;
	case VIRTIO_NET_HDR_GSO_TCPV4: return net_has(net, VIRTIO_NET_F_GUEST_TSO4);
	case VIRTIO_NET_HDR_GSO_TCPV6: return net_has(net, VIRTIO_NET_F_GUEST_TSO6);
	default: return net_has(net, VIRTIO_NET_F_GUEST_USO4) && net_has(net, VIRTIO_NET_F_GUEST_USO6);
	}
}

/* The headers of a large packet, as long as they say they are, and no longer than all of it. */
static uint16_t headers_length(const struct net_frame *frame)
{
	struct pieces from = pieces_of(frame->iov, frame->count);
	uint32_t length = frame->header.csum_start + UDP_SIZE;
	uint8_t offset = 0;

	if ((frame->header.gso_type & ~VIRTIO_NET_HDR_GSO_ECN) != VIRTIO_NET_HDR_GSO_UDP_L4) {
		pieces_skip(&from, frame->header.csum_start + 12u);
		pieces_read(&from, &offset, 1);
		offset = (uint8_t)((offset >> 4) * 4);
		length = frame->header.csum_start + (offset < TCP_MIN ? TCP_MIN : (uint32_t)offset);
	}
	if (length > frame->length)
		length = frame->length;
	return (uint16_t)(length > UINT16_MAX ? UINT16_MAX : length);
}

/* To a receiver that does itself what is left to do. */
static enum net_result pass_on(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct net_frame told = *frame;

	/* 5.1.6.4.1: not less than the headers. Of a switch's frames nobody has looked; a tap's kernel has said it. */
	if (frame->header.gso_type != VIRTIO_NET_HDR_GSO_NONE && !frame->header.hdr_len)
		told.header.hdr_len = headers_length(frame);
	/* 5.1.6.4.1: flags are 0 without GUEST_CSUM, DATA_VALID too, which a tap says of what a NIC has verified. */
	if (frame->header.flags && !net_has(pair->net, VIRTIO_NET_F_GUEST_CSUM))
		told.header.flags = 0, told.header.csum_start = told.header.csum_offset = 0;
	return net_frame_write(pair, w, &told);
}

static enum net_result deliver(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	const struct net_header *header = &frame->header;

	if (!receiver_segments(pair->net, header->gso_type))
		return segment(pair, w, frame);
	if (header->gso_type == VIRTIO_NET_HDR_GSO_NONE && is_oversized(pair->net, frame))
		return NET_REFUSED;
	if (header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM && !net_has(pair->net, VIRTIO_NET_F_GUEST_CSUM))
		return complete_checksum(pair, w, frame);
	return pass_on(pair, w, frame);
}

/* 5.1.6.5.1: what the driver does not want to hear ends here. */
static bool is_unwanted(const struct net_device *net, const struct net_frame *frame)
{
	struct pieces from = pieces_of(frame->iov, frame->count);
	uint8_t to[6];

	if (!net_filters(net))
		return false;
	pieces_read(&from, to, sizeof(to));
	return !net_wants(net, to);
}

enum net_result net_deliver(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct net_counters *counters = &pair->counters;
	enum net_result result;

	if (unlikely(!load_relaxed(&pair->net->link_up))) {
		stat_add(&counters->received_link_down, 1);
		return NET_REFUSED;
	}
	if (unlikely(is_unwanted(pair->net, frame))) {
		stat_add(&counters->filtered, 1);
		return NET_REFUSED;
	}
	result = deliver(pair, w, frame);
	if (likely(result == NET_DELIVERED))
		return result;
	if (result == NET_MALFORMED)
		stat_add(&counters->misreceived, 1);
	else if (result == NET_REFUSED)
		stat_add(&counters->refused, 1);
	else if (!pair->net->backend->receive)
		stat_add(&counters->no_buffers, 1); /* others keep it until there are some */
	return result;
}
