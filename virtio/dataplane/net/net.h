/*
 * The native network device (section 5.1): net/device.c makes it and does what Python says, net/queues.c drives its
 * queues, net/control.c obeys the driver, net/frame.c reads frames from and writes them to rings, net/offload.c does in
 * software what a receiver cannot, net/switch.c and net/fd.c are back ends.
 *
 * All of it runs on worker threads, and both queues of a pair on the same one. The ports of a switch share one worker.
 */
#ifndef HYPERBELL_NET_H
#define HYPERBELL_NET_H

#include "worker/worker.h"
#include "memory/pieces.h"

#include <pthread.h>

/* 5.1.3, feature bits that the data path looks at. */
#define VIRTIO_NET_F_CSUM 0
#define VIRTIO_NET_F_GUEST_CSUM 1
#define VIRTIO_NET_F_MTU 3
#define VIRTIO_NET_F_GUEST_TSO4 7
#define VIRTIO_NET_F_GUEST_TSO6 8
#define VIRTIO_NET_F_GUEST_ECN 9
#define VIRTIO_NET_F_HOST_TSO4 11
#define VIRTIO_NET_F_HOST_TSO6 12
#define VIRTIO_NET_F_HOST_ECN 13
#define VIRTIO_NET_F_MRG_RXBUF 15
#define VIRTIO_NET_F_CTRL_VQ 17
#define VIRTIO_NET_F_CTRL_RX 18
#define VIRTIO_NET_F_GUEST_ANNOUNCE 21
#define VIRTIO_NET_F_MQ 22
#define VIRTIO_NET_F_CTRL_MAC_ADDR 23
#define VIRTIO_F_VERSION_1 32
#define VIRTIO_NET_F_GUEST_USO4 54
#define VIRTIO_NET_F_GUEST_USO6 55
#define VIRTIO_NET_F_HOST_USO 56

/* 5.1.6: struct virtio_net_hdr, always with num_buffers (VERSION_1). */
#define VIRTIO_NET_HDR_F_NEEDS_CSUM 1
#define VIRTIO_NET_HDR_F_DATA_VALID 2
#define VIRTIO_NET_HDR_GSO_NONE 0
#define VIRTIO_NET_HDR_GSO_TCPV4 1
#define VIRTIO_NET_HDR_GSO_TCPV6 4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#define VIRTIO_NET_HDR_GSO_ECN 0x80

struct net_header {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t hdr_len;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
	uint16_t num_buffers;
};

#define NET_HEADER_SIZE 12
#define NET_LEGACY_HEADER_SIZE 10 /* 5.1.6.1: without num_buffers */
#define ETHERNET_SIZE 14
/* Ethernet, two VLAN tags, and the most that the length of an IP packet can say. */
#define NET_FRAME_MAX (ETHERNET_SIZE + 8 + 65535)
#define NET_IOV_MAX (CHAIN_DESCRIPTORS_MAX + 64) /* pieces of a frame: descriptors, and where buffers cross regions */
#define NET_TURN 64 /* frames a queue may move in one turn, fewer where they are long or become many (WORKER_TURN_BYTES) */
#define NET_DELIVERY_COST 512 /* what a frame, or a segment of one, counts beside its bytes: so many are copied meanwhile */
/* A packet of 64 KiB in the smallest segments that a TCP of ours would make (an MSS of 48) is fewer than these. */
#define NET_SEGMENTS_MAX 2048

struct net_frame { /* one frame on its way; the pieces are a guest's memory, or ours */
	struct net_header header; /* checked: all it claims lies inside the frame */
	const struct iovec *iov;
	uint32_t count;
	uint32_t length; /* without the header */
	uint32_t port;   /* switch: a flood of it continues there */
};

struct net_device;

/* Chains one frame may be spread over: 64 KiB in the 1.5 KiB buffers that drivers post, with room to spare. */
#define NET_MERGE_MAX 64

struct net_taken { /* chains that were popped, and may be given back */
	uint32_t heads[NET_MERGE_MAX];
	uint32_t count, slots;
};

struct net_pair { /* one receive and one transmit queue; worker thread */
	struct net_device *net;
	struct virtqueue *rx, *tx;  /* while a worker drives them */
	struct source source;       /* fd back ends */
	uint8_t *frame;             /* fd back ends: room for what was read, which may wait for buffers */
	uint8_t *work;              /* room for a frame that is summed or segmented on its way to the guest */
	uint32_t pending;           /* bytes in `frame` that the guest had no buffers for; 0: none */
	struct net_header pending_header;
	struct net_taken held;      /* buffers too few for it, which it keeps while it waits for more */
	uint32_t flooding;          /* switch: the port at which the frame that was put back is to continue, or 0 */
	uint32_t muted;             /* atomic: the transmit queue is disabled, what comes on it has no effect */
	uint32_t awake;             /* atomic: while it is, its ring is looked at: from a kick until there is nothing left */
	bool listening;             /* the receive queue is driven; under net_device.selecting */
	bool selected;              /* tap: the kernel spreads flows over this queue too; likewise */
	struct net_counters counters;
};

struct net_backend {
	/* Take a frame from the guest, or drop and count it. False: not now, or not all of it: it is sent again later. */
	bool (*send)(struct net_pair *pair, struct worker *w, const struct net_frame *frame);
	/* The next frame for the guest into pair->frame: its length, 0: none now. NULL: none comes from a source. */
	uint32_t (*receive)(struct net_pair *pair, struct net_header *header);
	/* Frames for the guest go to the pairs that are `selected` from now on; NULL: whoever sends them looks. */
	void (*select)(struct net_pair *pair, bool selected);
};

#define NET_FILTER_MAX 64
#define NET_FLOWS 256 /* a power of two */

struct net_filter { /* 5.1.6.5.1, 5.1.6.5.2: written where the control queue is driven; all atomic */
	uint32_t promiscuous;
	uint32_t all_groups;
	uint32_t overflow;  /* the driver gave more addresses than there is room for */
	uint32_t count;
	uint64_t own;       /* the driver's address, packed as the table's are */
	uint64_t table[NET_FILTER_MAX];
};

struct net_switch;

struct net_device {
	struct native_device native; /* first */
	struct net_setup setup;      /* immutable; its fds are ours */
	const struct net_backend *backend;
	struct net_switch *lan;      /* NET_BACKEND_SWITCH; a reference */
	uint32_t lan_port;           /* worker: where it is plugged in; NET_NO_PORT: nowhere */
	uint32_t lan_pairs;          /* worker: how many of its pairs are driven */
	uint8_t flow_pairs[NET_FLOWS]; /* worker: on which pair the driver last sent something of a flow, + 1; 0: never */
	uint64_t features;           /* atomic: what the driver accepted */
	uint32_t link_up;            /* atomic */
	uint32_t mtu;                /* atomic: 0: none was told */
	uint32_t announcing;         /* atomic: the driver was asked to announce itself, and has not acknowledged that */
	uint64_t rarp;               /* atomic: the address to announce for it, packed; 0: none */
	pthread_mutex_t selecting;   /* for the next two, and what pairs say of it */
	uint32_t allowed_pairs;      /* that the driver agreed to (5.1.6.5.6) */
	uint32_t active_pairs;       /* atomic: receive queues that frames are spread over, at least 1 */
	uint32_t pairs_unsaid;       /* atomic: no control queue was driven since the features were accepted */
	struct virtqueue *control;   /* atomic: while a worker drives it */
	struct net_filter filter;
	struct net_pair pairs[NET_PAIRS_MAX];
};

#define NET_NO_PORT UINT32_MAX

static inline bool net_has(const struct net_device *net, uint32_t bit)
{
	return load_relaxed(&net->features) >> bit & 1;
}

static inline uint32_t net_header_size(const struct net_device *net)
{
	uint64_t features = load_relaxed(&net->features);

	return features >> VIRTIO_F_VERSION_1 & 1 || features >> VIRTIO_NET_F_MRG_RXBUF & 1 ? NET_HEADER_SIZE
											    : NET_LEGACY_HEADER_SIZE;
}

/* ---- net/frame.c ---- */

/*
 * A popped transmit chain as a frame. `iov` has room for the chain's pieces. False: the header lies, or there is no
 * frame in it; nothing but that frame is lost.
 */
bool net_frame_read(struct net_device *net, const struct chain_view *chain, struct iovec *iov, struct net_frame *frame);

/* What the header of a frame of `length` bytes claims lies inside the frame, and is of a kind that there is. */
bool net_header_plausible(const struct net_header *header, uint32_t length);

/* NO_BUFFERS may go better later, the others never: REFUSED is too large (for the buffers, the ring, the MTU), MALFORMED has a header that lies. */
enum net_result { NET_DELIVERED, NET_NO_BUFFERS, NET_REFUSED, NET_MALFORMED };
/* Write a frame to the guest as it is. */
enum net_result net_frame_write(struct net_pair *pair, struct worker *w, const struct net_frame *frame);

/* The buffers that a waiting frame keeps are the driver's again. */
void net_give_back(struct net_pair *pair);

/* ---- net/offload.c ---- */

/* Write a frame to the guest, doing in software what its driver did not offer to. Counts what is dropped. */
enum net_result net_deliver(struct net_pair *pair, struct worker *w, const struct net_frame *frame);

/* ---- net/flow.c ---- */

#define ETHERTYPE_QINQ 0x88a8

static inline uint16_t net_read16(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

/* Where the network's header begins in a frame of that length, behind two VLAN tags at most, and of which type it is. */
uint32_t net_network_offset(const uint8_t *bytes, uint32_t length, uint16_t *ether_type);
/* Which of NET_FLOWS a frame belongs to, the same for both directions of a conversation; NET_NO_FLOW: it is not IP. */
uint32_t net_flow(const struct net_frame *frame);
#define NET_NO_FLOW UINT32_MAX

/* ---- net/queues.c ---- */

extern const struct queue_ops net_queue_ops;
/* Any thread: the driver agreed to use so many pairs. */
void net_allow_pairs(struct net_device *net, uint32_t pairs);
/* A pair's receive queue is attached, or is no more. */
void net_pair_listens(struct net_pair *pair, bool listening);

/* ---- net/control.c ---- */

bool net_control_turn(struct net_device *net, struct worker *w, struct virtqueue *vq);
void net_filter_reset(struct net_device *net);
bool net_wants(const struct net_device *net, const uint8_t mac[6]);

static inline bool net_filters(const struct net_device *net)
{
	return !load_relaxed(&net->filter.promiscuous) && !load_relaxed(&net->filter.overflow);
}

/* ---- net/switch.c ---- */

extern const struct net_backend net_switch_backend;
struct net_switch *net_switch_ref(struct net_switch *lan);
void net_switch_plug(struct net_device *net, const struct worker *w);
void net_switch_unplug(struct net_device *net);

/* ---- net/fd.c ---- */

extern const struct net_backend net_tap_backend, net_datagram_backend;

#endif
