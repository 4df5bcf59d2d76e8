/* What the driver says by the control queue (section 5.1.6.5), and which frames it wants to hear after that. */
#include "net/net.h"

#define CONTROL_RX 0 /* 5.1.6.5.1 */
#define CONTROL_RX_PROMISC 0
#define CONTROL_RX_ALLMULTI 1
#define CONTROL_MAC 1 /* 5.1.6.5.2 */
#define CONTROL_MAC_TABLE_SET 0
#define CONTROL_MAC_ADDR_SET 1
#define CONTROL_ANNOUNCE 3 /* 5.1.6.5.4 */
#define CONTROL_ANNOUNCE_ACK 0
#define CONTROL_MQ 4 /* 5.1.6.5.6 */
#define CONTROL_MQ_VQ_PAIRS_SET 0

#define CONTROL_OK 0
#define CONTROL_ERR 1
#define MAC_SIZE 6

static uint64_t mac_pack(const uint8_t mac[MAC_SIZE])
{
	uint64_t packed = 0;

	memcpy(&packed, mac, MAC_SIZE);
	return packed;
}

static bool is_group(uint64_t packed)
{
	return packed & 1;
}

void net_filter_reset(struct net_device *net)
{
	store_relaxed(&net->filter.own, mac_pack(net->setup.mac));
	store_relaxed(&net->filter.count, 0);
	store_relaxed(&net->filter.all_groups, 0);
	store_relaxed(&net->filter.overflow, 0);
	/* A driver that never says what it wants gets everything. */
	store_relaxed(&net->filter.promiscuous, 1);
}

bool net_wants(const struct net_device *net, const uint8_t mac[MAC_SIZE])
{
	static const uint8_t broadcast[MAC_SIZE] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
	uint64_t to = mac_pack(mac);
	uint32_t count = load_relaxed(&net->filter.count);

	if (to == load_relaxed(&net->filter.own) || to == mac_pack(broadcast))
		return true;
	if (is_group(to) && load_relaxed(&net->filter.all_groups))
		return true;
	for (uint32_t i = 0; i < count; i++)
		if (load_relaxed(&net->filter.table[i]) == to)
			return true;
	return false;
}

void net_mac(struct native_device *device, uint8_t mac[MAC_SIZE])
{
	uint64_t own = load_relaxed(&((struct net_device *)device)->filter.own);

	memcpy(mac, &own, MAC_SIZE);
}

void net_set_mac(struct native_device *device, const uint8_t mac[MAC_SIZE])
{
	store_relaxed(&((struct net_device *)device)->filter.own, mac_pack(mac));
}

/* ---- the commands; `data` is what follows class and command; true: done ---- */

static bool set_switch(struct pieces *data, uint64_t size, uint32_t *flag)
{
	uint8_t on = 2; /* neither */

	if (size != 1)
		return false;
	pieces_read(data, &on, 1);
	if (on > 1)
		return false;
	store_relaxed(flag, on);
	return true;
}

static bool set_rx(struct net_device *net, uint8_t command, struct pieces *data, uint64_t size)
{
	switch (command) {
	case CONTROL_RX_PROMISC: return set_switch(data, size, &net->filter.promiscuous);
	case CONTROL_RX_ALLMULTI: return set_switch(data, size, &net->filter.all_groups);
	default: return false;
	}
}

/* 5.1.6.5.2: two lists, of single stations and of groups, each with the number of its entries before it. */
static bool set_mac_table(struct net_device *net, struct pieces *data, uint64_t size)
{
	uint64_t table[NET_FILTER_MAX];
	uint32_t count = 0;
	bool overflow = false;

	for (int list = 0; list < 2; list++) {
		uint32_t entries;

		if (size < sizeof(entries))
			return false;
		pieces_read(data, &entries, sizeof(entries));
		size -= sizeof(entries);
		if (entries > size / MAC_SIZE)
			return false;
		size -= (uint64_t)entries * MAC_SIZE;
		for (uint32_t i = 0; i < entries; i++) {
			uint8_t mac[MAC_SIZE];

			pieces_read(data, mac, MAC_SIZE);
			if (count < NET_FILTER_MAX)
				table[count++] = mac_pack(mac);
			else
				overflow = true;
		}
	}
	if (size)
		return false;
	/* A receiver on another thread may see a mixture for a moment, as it may see either. */
	for (uint32_t i = 0; i < count; i++)
		store_relaxed(&net->filter.table[i], table[i]);
	/* 5.1.6.5.2 lets a device that is given too many become promiscuous. */
	store_relaxed(&net->filter.count, count);
	store_relaxed(&net->filter.overflow, overflow);
	return true;
}

static bool set_mac(struct net_device *net, uint8_t command, struct pieces *data, uint64_t size)
{
	uint8_t mac[MAC_SIZE];

	if (command == CONTROL_MAC_TABLE_SET && net_has(net, VIRTIO_NET_F_CTRL_RX))
		return set_mac_table(net, data, size);
	if (command != CONTROL_MAC_ADDR_SET || !net_has(net, VIRTIO_NET_F_CTRL_MAC_ADDR) || size != MAC_SIZE)
		return false;
	pieces_read(data, mac, MAC_SIZE);
	store_relaxed(&net->filter.own, mac_pack(mac));
	return true;
}

static bool set_pairs(struct net_device *net, uint8_t command, struct pieces *data, uint64_t size)
{
	uint16_t pairs;

	if (command != CONTROL_MQ_VQ_PAIRS_SET || size != sizeof(pairs))
		return false;
	pieces_read(data, &pairs, sizeof(pairs));
	if (pairs < 1 || pairs > net->setup.pairs)
		return false;
	net_allow_pairs(net, pairs);
	return true;
}

/* One command; a class whose feature was not accepted is as unknown as any other. */
static bool obey(struct net_device *net, struct pieces *data, uint64_t size)
{
	uint8_t head[2];

	if (size < sizeof(head))
		return false;
	pieces_read(data, head, sizeof(head));
	size -= sizeof(head);
	switch (head[0]) {
	case CONTROL_RX:
		return net_has(net, VIRTIO_NET_F_CTRL_RX) && set_rx(net, head[1], data, size);
	case CONTROL_MAC:
		return set_mac(net, head[1], data, size);
	case CONTROL_ANNOUNCE:
		if (!net_has(net, VIRTIO_NET_F_GUEST_ANNOUNCE) || head[1] != CONTROL_ANNOUNCE_ACK || size)
			return false;
		store_relaxed(&net->announcing, 0);
		return true;
	case CONTROL_MQ:
		return net_has(net, VIRTIO_NET_F_MQ) && set_pairs(net, head[1], data, size);
	default:
		return false;
	}
}

bool net_control_turn(struct net_device *net, struct worker *w, struct virtqueue *vq)
{
	struct chain_view chain = { .iov = w->scratch };
	uint64_t start = now_ns();
	uint32_t served = 0;

	/* A command may have the kernel change a tap, which takes long. */
	while (served < WORKER_TURN && (!served || now_ns() - start < w->turn_ns) &&
	       virtqueue_pop(vq, &chain) == VQ_CHAIN) {
		struct pieces data = pieces_of(chain.iov, chain.readable_count);
		struct pieces answer = pieces_of(chain.iov + chain.readable_count, chain.writable_count);
		uint8_t ack;

		served++;
		if (!chain.writable_len) { /* there is no place to say that this is wrong */
			virtqueue_fail(vq, VQ_FAULT_SHAPE, chain.head, chain.readable_len, 0);
			virtqueue_push(vq, chain.head, chain.slots, 0); /* only off the books */
			break;
		}
		ack = obey(net, &data, chain.readable_len) ? CONTROL_OK : CONTROL_ERR;
		pieces_write(&answer, &ack, sizeof(ack));
		op_stats_add(&vq->stats.ops[NET_OP_CONTROL], 0, chain.readable_len, ack != CONTROL_OK);
		virtqueue_push(vq, chain.head, chain.slots, sizeof(ack));
		worker_touch(w, vq);
	}
	return served > 0;
}
