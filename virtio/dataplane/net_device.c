/* The network device's queues (section 5.1.6): who has a turn when, and what becomes of a frame that has to wait. */
#include "net.h"

#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#define RARP_SIZE 60 /* the least an Ethernet frame may have */

/* ---- back ends that lead nowhere ---- */

static bool drop_send(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	(void)w;
	(void)frame;
	stat_add(&pair->counters.dropped, 1);
	return true;
}

static bool reflect_send(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	net_deliver(pair, w, frame);
	return true;
}

static const struct net_backend drop_backend = { .send = drop_send };
static const struct net_backend reflect_backend = { .send = reflect_send };

static const struct net_backend *const backends[] = {
	[NET_BACKEND_DROP] = &drop_backend,
	[NET_BACKEND_REFLECT] = &reflect_backend,
	[NET_BACKEND_SWITCH] = &net_switch_backend,
	[NET_BACKEND_TAP] = &net_tap_backend,
	[NET_BACKEND_DATAGRAM] = &net_datagram_backend,
};

/* ---- from the guest ---- */

static bool transmit_blocked(const struct net_pair *pair)
{
	return pair->net->backend->receive && !(pair->source.ready & POLLOUT) && !load_relaxed(&pair->muted);
}

static bool transmit_turn(struct net_pair *pair, struct worker *w)
{
	struct virtqueue *vq = pair->tx;
	struct net_device *net = pair->net;
	struct chain_view chain = { .iov = w->scratch };
	struct iovec iov[CHAIN_IOV_MAX];
	struct net_frame frame;
	uint32_t moved = 0;

	while (moved < NET_TURN && !transmit_blocked(pair) && virtqueue_pop(vq, &chain) == VQ_CHAIN) {
		bool honest = net_frame_read(net, &chain, iov, &frame);
		uint32_t head = chain.head, slots = chain.slots;

		if (!honest) {
			stat_add(&pair->counters.malformed, 1);
			op_stats_add(&vq->stats.ops[NET_OP_TRANSMIT], 0, 0, true);
		} else if (load_relaxed(&pair->muted)) {
			stat_add(&pair->counters.sent_disabled, 1);
			op_stats_add(&vq->stats.ops[NET_OP_TRANSMIT], 0, 0, true);
		} else if (!load_relaxed(&net->link_up)) {
			stat_add(&pair->counters.sent_link_down, 1);
			op_stats_add(&vq->stats.ops[NET_OP_TRANSMIT], 0, 0, true);
		} else if (!net->backend->send(pair, w, &frame)) {
			virtqueue_unpop(vq, &head, 1, slots);
			break;
		} else {
			op_stats_add(&vq->stats.ops[NET_OP_TRANSMIT], 0, frame.length, false);
		}
		virtqueue_push(vq, head, slots, 0);
		worker_touch(w, vq);
		moved++;
	}
	return moved > 0;
}

/* ---- to the guest, from a source ---- */

static bool receive_ready(const struct net_pair *pair)
{
	if (!pair->net->backend->receive)
		return false;
	return pair->pending ? virtqueue_has_work(pair->rx) : pair->source.ready & POLLIN;
}

static bool receive_one(struct net_pair *pair, struct worker *w)
{
	struct net_frame frame = { .count = 1 };
	struct iovec iov;
	bool waited = pair->pending;

	if (!waited) {
		pair->pending = pair->net->backend->receive(pair, &pair->pending_header);
		if (!pair->pending)
			return false;
	}
	iov = (struct iovec){ pair->frame, pair->pending };
	frame.header = pair->pending_header;
	frame.iov = &iov;
	frame.length = pair->pending;
	if (net_deliver(pair, w, &frame) == NET_NO_BUFFERS)
		return false; /* it stays, and so does what is behind it in the tap or the socket */
	pair->pending = 0;
	return true;
}

static bool receive_turn(struct net_pair *pair, struct worker *w)
{
	uint32_t moved = 0;

	if (!pair->net->backend->receive)
		return false;
	while (moved < NET_TURN && receive_one(pair, w))
		moved++;
	return moved > 0;
}

/* ---- the worker's side ---- */

/* ---- how many pairs are in use ---- */

/* After a change of what the pairs listen to or what the driver allows. */
static void pairs_select(struct net_device *net)
{
	uint32_t active = 0;

	while (active < net->allowed_pairs && net->pairs[active].listening)
		active++;
	store_relaxed(&net->active_pairs, active ? active : 1);
	if (!net->backend->select || net->setup.pairs == 1)
		return;
	for (uint32_t i = 0; i < net->setup.pairs; i++) {
		/* With no driver at all everything is as it was when the back end was opened. */
		bool selected = active == 0 || (i < net->allowed_pairs && net->pairs[i].listening);

		if (selected != net->pairs[i].selected)
			net->backend->select(&net->pairs[i], selected);
		net->pairs[i].selected = selected;
	}
}

static void pair_listens(struct net_pair *pair, bool listening)
{
	pthread_mutex_lock(&pair->net->selecting);
	pair->listening = listening;
	pairs_select(pair->net);
	pthread_mutex_unlock(&pair->net->selecting);
}

void net_allow_pairs(struct net_device *net, uint32_t pairs)
{
	pthread_mutex_lock(&net->selecting);
	net->allowed_pairs = pairs;
	pairs_select(net);
	pthread_mutex_unlock(&net->selecting);
}

/* ---- the worker's side ---- */

/* 5.1.2: the control queue comes after all pairs that could be, or after the first one where MQ was not accepted. */
static bool is_control(const struct net_device *net, const struct virtqueue *vq)
{
	return net_has(net, VIRTIO_NET_F_CTRL_VQ) &&
	       vq->index == 2 * (net_has(net, VIRTIO_NET_F_MQ) ? net->setup.pairs : 1);
}

/* NULL: the queue of no pair. */
static struct net_pair *pair_of(struct net_device *net, const struct virtqueue *vq)
{
	return vq != load_relaxed(&net->control) && vq->index / 2 < net->setup.pairs ? &net->pairs[vq->index / 2] : NULL;
}

static bool is_receive(const struct virtqueue *vq)
{
	return vq->index % 2 == 0; /* 5.1.2 */
}

static void control_attached(struct net_device *net, struct virtqueue *vq)
{
	store_relaxed(&net->control, vq);
	/* 5.1.6.5.6: only the first pair, until the driver has said how many. */
	if (__atomic_exchange_n(&net->pairs_unsaid, 0, __ATOMIC_RELAXED) && net_has(net, VIRTIO_NET_F_MQ))
		net_allow_pairs(net, 1);
}

static void net_attached(struct native_device *device, struct worker *w, struct virtqueue *vq)
{
	struct net_device *net = (struct net_device *)device;
	struct net_pair *pair;

	if (is_control(net, vq))
		control_attached(net, vq);
	pair = pair_of(net, vq);
	if (!pair)
		return;
	if (net->lan && !pair->rx && !pair->tx)
		net_switch_plug(net, w);
	if (net->backend->receive && !pair->rx && !pair->tx)
		source_add(w, &pair->source, device);
	if (is_receive(vq)) {
		pair->rx = vq;
		pair_listens(pair, true);
	} else {
		pair->tx = vq;
	}
}

/* The queue stops when nothing of it is in flight any more, and what a frame waits with would be that for ever. */
static void net_detaching(struct native_device *device, struct virtqueue *vq)
{
	struct net_pair *pair = pair_of((struct net_device *)device, vq);

	if (pair && is_receive(vq))
		net_give_back(pair);
}

static void net_detached(struct native_device *device, struct worker *w, struct virtqueue *vq)
{
	struct net_device *net = (struct net_device *)device;
	struct net_pair *pair = pair_of(net, vq);

	if (vq == load_relaxed(&net->control))
		store_relaxed(&net->control, NULL);
	if (!pair)
		return;
	if (is_receive(vq)) {
		pair->rx = NULL;
		pair->pending = 0; /* the guest that it was for has gone */
		pair_listens(pair, false);
	} else {
		pair->tx = NULL;
	}
	if (pair->rx || pair->tx)
		return;
	if (net->lan)
		net_switch_unplug(net);
	if (net->backend->receive)
		source_remove(w, &pair->source);
}

static bool net_ready(struct native_device *device, struct virtqueue *vq)
{
	struct net_device *net = (struct net_device *)device;
	struct net_pair *pair = pair_of(net, vq);

	if (!pair) /* a queue that no accepted feature gives a meaning is left alone */
		return vq == load_relaxed(&net->control) && virtqueue_has_work(vq);
	return is_receive(vq) ? receive_ready(pair) : !transmit_blocked(pair) && virtqueue_has_work(vq);
}

static bool net_turn(struct native_device *device, struct worker *w, struct virtqueue *vq)
{
	struct net_device *net = (struct net_device *)device;
	struct net_pair *pair = pair_of(net, vq);

	if (!pair)
		return vq == load_relaxed(&net->control) && net_control_turn(net, w, vq);
	return is_receive(vq) ? receive_turn(pair, w) : transmit_turn(pair, w);
}

static bool net_arm(struct native_device *device, struct virtqueue *vq)
{
	struct net_device *net = (struct net_device *)device;
	struct net_pair *pair = pair_of(net, vq);

	if (!pair)
		return vq != load_relaxed(&net->control) || virtqueue_arm(vq);
	if (is_receive(vq))
		/* New buffers are of interest only to a frame that waits for them; else kicks would be for nothing. */
		return pair->pending ? virtqueue_arm(vq) : !receive_ready(pair);
	return transmit_blocked(pair) || virtqueue_arm(vq);
}

static const struct queue_ops net_queue_ops = {
	.attached = net_attached,
	.detaching = net_detaching,
	.detached = net_detached,
	.ready = net_ready,
	.turn = net_turn,
	.arm = net_arm,
};

/* ---- making and ending it ---- */

static void net_free(struct native_device *device)
{
	struct net_device *net = (struct net_device *)device;

	for (uint32_t i = 0; i < net->setup.pairs; i++) {
		if (net->pairs[i].source.fd >= 0)
			close(net->pairs[i].source.fd);
		free(net->pairs[i].frame);
		free(net->pairs[i].work);
	}
	net_switch_unref(net->lan);
	pthread_mutex_destroy(&net->selecting);
	free(net);
}

/* A RARP request that says where the station is now: what VHOST_USER_SEND_RARP asks for (RFC 903). */
static void send_rarp(struct native_device *device, struct worker *w)
{
	static const uint8_t middle[] = { 0x80, 0x35, 0, 1, 0x08, 0, 6, 4, 0, 3 }; /* type; Ethernet, IPv4, request */
	struct net_device *net = (struct net_device *)device;
	uint64_t mac = __atomic_exchange_n(&net->rarp, 0, __ATOMIC_RELAXED);
	uint8_t bytes[RARP_SIZE] = { 0 };
	struct iovec iov = { bytes, sizeof(bytes) };
	struct net_frame frame = { .iov = &iov, .count = 1, .length = sizeof(bytes) };

	if (!mac)
		return;
	memset(bytes, 0xff, 6);
	memcpy(bytes + 6, &mac, 6);
	memcpy(bytes + 12, middle, sizeof(middle));
	memcpy(bytes + 22, &mac, 6); /* the sender's address, and the one asked about; of IP nobody knows anything */
	memcpy(bytes + 32, &mac, 6);
	if (!load_relaxed(&net->link_up))
		stat_add(&net->pairs[0].counters.sent_link_down, 1);
	else if (!net->backend->send(&net->pairs[0], w, &frame))
		stat_add(&net->pairs[0].counters.dropped, 1); /* full: whoever migrated says it more than once */
}

static const struct native_ops net_ops = { .queue = &net_queue_ops, .nudged = send_rarp, .free = net_free };

static int pair_prepare(struct net_device *net, struct net_pair *pair, int fd)
{
	pair->net = net;
	pair->selected = true;
	pair->source.fd = -1;
	pair->source.events = POLLIN | POLLOUT;
	pair->frame = malloc(NET_FRAME_MAX);
	pair->work = malloc(NET_FRAME_MAX);
	if (!pair->frame || !pair->work)
		return -ENOMEM;
	if (!net->backend->receive)
		return 0;
	pair->source.fd = dup(fd);
	return pair->source.fd < 0 ? -errno : 0;
}

struct native_device *net_new(const struct net_setup *setup, struct net_switch *lan, int *error)
{
	struct net_device *net;

	*error = -EINVAL;
	if (setup->backend >= ARRAY_SIZE(backends) || setup->pairs == 0 || setup->pairs > NET_PAIRS_MAX ||
	    (setup->backend == NET_BACKEND_SWITCH) != (lan != NULL))
		return NULL;
	*error = -ENOMEM;
	net = calloc(1, sizeof(*net));
	if (!net)
		return NULL;
	net->native.ops = &net_ops;
	net->native.refs = 1;
	net->setup = *setup;
	net->backend = backends[setup->backend];
	net->lan = lan ? net_switch_ref(lan) : NULL;
	net->lan_port = NET_NO_PORT;
	net->link_up = net->active_pairs = 1;
	net->allowed_pairs = setup->pairs;
	pthread_mutex_init(&net->selecting, NULL);
	net_filter_reset(net);
	for (uint32_t i = 0; i < setup->pairs; i++)
		net->pairs[i].source.fd = -1;
	*error = 0;
	for (uint32_t i = 0; i < setup->pairs && *error == 0; i++)
		*error = pair_prepare(net, &net->pairs[i], setup->fds[i]);
	if (*error == 0)
		return &net->native;
	net_free(&net->native);
	return NULL;
}

/* ---- what Python sets and asks ---- */

void net_set_features(struct native_device *device, uint64_t features)
{
	struct net_device *net = (struct net_device *)device;

	if (features == load_relaxed(&net->features))
		return; /* vhost-user front-ends repeat themselves, also while queues run */
	store_relaxed(&net->features, features);
	store_relaxed(&net->announcing, 0);
	net_filter_reset(net);
	/* A front-end that keeps the control queue to itself drives as many pairs as its guest wants. */
	net_allow_pairs(net, net->setup.pairs);
	store_relaxed(&net->pairs_unsaid, 1);
}

void net_set_link(struct native_device *device, uint32_t up)
{
	store_relaxed(&((struct net_device *)device)->link_up, up);
}

void net_mute(struct native_device *device, uint32_t pair, uint32_t on)
{
	struct net_device *net = (struct net_device *)device;

	if (pair < net->setup.pairs)
		store_relaxed(&net->pairs[pair].muted, on);
}

void net_ask_to_announce(struct native_device *device)
{
	struct net_device *net = (struct net_device *)device;

	store_relaxed(&net->announcing, net_has(net, VIRTIO_NET_F_GUEST_ANNOUNCE));
}

uint32_t net_announcing(struct native_device *device)
{
	return load_relaxed(&((struct net_device *)device)->announcing);
}

uint32_t net_active_pairs(struct native_device *device)
{
	return load_relaxed(&((struct net_device *)device)->active_pairs);
}

void net_prepare_rarp(struct native_device *device, const uint8_t mac[6])
{
	uint64_t packed = 0;

	memcpy(&packed, mac, 6);
	store_relaxed(&((struct net_device *)device)->rarp, packed);
}

void net_counters(struct native_device *device, struct net_counters *sum)
{
	struct net_device *net = (struct net_device *)device;

	memset(sum, 0, sizeof(*sum));
	for (uint32_t i = 0; i < net->setup.pairs; i++) {
		const uint64_t *from = (const uint64_t *)&net->pairs[i].counters;
		uint64_t *to = (uint64_t *)sum;

		for (size_t reason = 0; reason < sizeof(*sum) / sizeof(*to); reason++)
			to[reason] += load_relaxed(&from[reason]);
	}
}
