/* Frames out of and into the rings: section 5.1.6. What a header claims is checked here, once, against a copy. */
#include "net/net.h"

static bool gso_allowed(const struct net_device *net, uint8_t gso_type)
{
	if (gso_type & VIRTIO_NET_HDR_GSO_ECN && !net_has(net, VIRTIO_NET_F_HOST_ECN))
		return false;
	switch (gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
	case VIRTIO_NET_HDR_GSO_TCPV4: return net_has(net, VIRTIO_NET_F_HOST_TSO4);
	case VIRTIO_NET_HDR_GSO_TCPV6: return net_has(net, VIRTIO_NET_F_HOST_TSO6);
	case VIRTIO_NET_HDR_GSO_UDP_L4: return net_has(net, VIRTIO_NET_F_HOST_USO);
	default: return false;
	}
}

bool net_header_plausible(const struct net_header *header, uint32_t length)
{
	bool sums = header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;

	if (sums && (header->csum_start < ETHERNET_SIZE || header->csum_start + header->csum_offset + 2u > length))
		return false;
	switch (header->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
	case VIRTIO_NET_HDR_GSO_NONE: return header->gso_type == VIRTIO_NET_HDR_GSO_NONE;
	case VIRTIO_NET_HDR_GSO_TCPV4:
	case VIRTIO_NET_HDR_GSO_TCPV6:
	case VIRTIO_NET_HDR_GSO_UDP_L4: return header->gso_size;
	default: return false;
	}
}

/* 5.1.6.2.1: what the driver must not do in a header; only negotiated offloads, and only inside the frame. */
static bool header_honest(const struct net_device *net, const struct net_header *header, uint32_t length)
{
	if (header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM && !net_has(net, VIRTIO_NET_F_CSUM))
		return false;
	if (!net_header_plausible(header, length))
		return false;
	if (header->gso_type == VIRTIO_NET_HDR_GSO_NONE)
		return true;
	return header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM && gso_allowed(net, header->gso_type);
}

bool net_frame_read(struct net_device *net, const struct chain_view *chain, struct iovec *iov, struct net_frame *frame)
{
	struct pieces from = pieces_of(chain->iov, chain->readable_count);
	uint32_t header_size = net_header_size(net);

	if (chain->readable_count > NET_IOV_MAX || chain->readable_len < header_size + ETHERNET_SIZE || chain->readable_len > header_size + NET_FRAME_MAX)
		return false;
	pieces_read(&from, &frame->header, header_size);
	frame->length = (uint32_t)chain->readable_len - header_size;
	frame->iov = iov;
	frame->count = pieces_rest(&from, iov, NET_IOV_MAX);
	/* 5.1.6.2: hdr_len is a hint that a device may not rely on, flags other than NEEDS_CSUM are the device's. */
	frame->header.flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
	frame->header.hdr_len = 0;
	frame->header.num_buffers = 0;
	return header_honest(net, &frame->header, frame->length);
}

struct merge { /* the chains that one frame has taken so far */
	struct net_taken taken;
	uint32_t written[NET_MERGE_MAX], slots[NET_MERGE_MAX];
	uint32_t count;
};

void net_give_back(struct net_pair *pair)
{
	virtqueue_unpop(pair->rx, pair->held.heads, pair->held.count, pair->held.slots);
	pair->held.count = pair->held.slots = 0;
}

/* The driver has no descriptors left for one more buffer like the first: no more will come before these are used. */
static bool ring_full(const struct virtqueue *vq, const struct merge *merge)
{
	return merge->count && merge->taken.slots + merge->slots[0] > vq->size;
}

static enum net_result give_up(struct net_pair *pair, struct merge *merge, enum net_result result)
{
	merge->taken.count = merge->count;
	if (result == NET_NO_BUFFERS && virtqueue_runnable(pair->rx) && ring_full(pair->rx, merge))
		result = NET_REFUSED;
	/* A frame that waits keeps what it has: then only more buffers are work, and only they are worth a kick. */
	if (result == NET_NO_BUFFERS && pair->net->backend->receive && virtqueue_runnable(pair->rx))
		pair->held = merge->taken;
	else
		virtqueue_unpop(pair->rx, merge->taken.heads, merge->taken.count, merge->taken.slots);
	return result;
}

/* The next receive buffer, accounted to `merge`; its writable bytes, 0: there is none, *result says more. */
static uint64_t buffer_take(struct virtqueue *vq, struct chain_view *chain, struct merge *merge,
			    uint32_t header_size, enum net_result *result)
{
	*result = NET_NO_BUFFERS;
	if (merge->count == NET_MERGE_MAX) {
		*result = NET_REFUSED;
		return 0;
	}
	if (virtqueue_pop(vq, chain) != VQ_CHAIN)
		return 0;
	merge->taken.heads[merge->count] = chain->head;
	merge->slots[merge->count] = chain->slots;
	merge->written[merge->count++] = 0;
	merge->taken.slots += chain->slots;
	/* 5.1.6.3.1: a receive buffer has room for a header at least, and is there to be written to. */
	if (chain->writable_len < header_size) {
		virtqueue_fail(vq, VQ_FAULT_SHAPE, chain->head, chain->readable_len, chain->writable_len);
		*result = NET_REFUSED;
		return 0;
	}
	return chain->writable_len;
}

enum net_result net_frame_write(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct virtqueue *vq = pair->rx;
	struct chain_view chain = { .iov = w->scratch };
	struct merge merge;
	struct pieces from = pieces_of(frame->iov, frame->count), to, header_at;
	bool mergeable = net_has(pair->net, VIRTIO_NET_F_MRG_RXBUF);
	struct net_header header = frame->header;
	uint64_t left = frame->length, room;
	uint32_t header_size = net_header_size(pair->net);
	struct iovec first[NET_HEADER_SIZE];
	enum net_result result;

	w->moved += frame->length + NET_DELIVERY_COST;
	if (!vq || vq->detaching)
		return NET_NO_BUFFERS;
	merge.count = merge.taken.slots = 0;
	net_give_back(pair);
	room = buffer_take(vq, &chain, &merge, header_size, &result);
	if (!room)
		return give_up(pair, &merge, result);
	if (!mergeable && room < header_size + left)
		return give_up(pair, &merge, NET_REFUSED);
	to = pieces_of(chain.iov + chain.readable_count, chain.writable_count);
	/* The header is written last, when the number of buffers is known: keep its pieces, at most one a byte. */
	memcpy(first, to.iov, (to.count < NET_HEADER_SIZE ? to.count : NET_HEADER_SIZE) * sizeof(first[0]));
	header_at = pieces_of(first, to.count < NET_HEADER_SIZE ? to.count : NET_HEADER_SIZE);
	pieces_skip(&to, header_size);
	merge.written[0] = header_size;
	room -= header_size;
	for (;;) {
		uint64_t n = pieces_move(&to, &from, left < room ? left : room);

		merge.written[merge.count - 1] += (uint32_t)n;
		left -= n;
		if (!left)
			break;
		room = buffer_take(vq, &chain, &merge, header_size, &result);
		if (!room)
			return give_up(pair, &merge, result);
		to = pieces_of(chain.iov + chain.readable_count, chain.writable_count);
	}
	header.num_buffers = (uint16_t)merge.count; /* 5.1.6.4.1: 1 without MRG_RXBUF */
	pieces_write(&header_at, &header, header_size);
	for (uint32_t i = 0; i < merge.count; i++)
		virtqueue_push(vq, merge.taken.heads[i], merge.slots[i], merge.written[i]);
	worker_touch(w, vq);
	op_stats_add(&vq->stats.ops[NET_OP_RECEIVE], 0, frame->length, false);
	return NET_DELIVERED;
}
