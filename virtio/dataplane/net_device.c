/* The network device's queues (section 5.1.6): who has a turn when, and what becomes of a frame that has to wait. */
#include "net.h"

#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- back ends that lead nowhere ---- */

static bool drop_send(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	(void)w;
	(void)frame;
	stat_add(&pair->net->counters.dropped, 1);
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
	return pair->net->backend->receive && !(pair->source.ready & POLLOUT);
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
			stat_add(&net->counters.malformed, 1);
			op_stats_add(&vq->stats.ops[NET_OP_TRANSMIT], 0, 0, true);
		} else if (!load_relaxed(&net->link_up)) {
			stat_add(&net->counters.dropped, 1);
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

static struct net_pair *pair_of(struct native_device *device, const struct virtqueue *vq)
{
	return &((struct net_device *)device)->pairs[vq->index / 2];
}

static bool is_receive(const struct virtqueue *vq)
{
	return vq->index % 2 == 0; /* 5.1.2 */
}

static void net_attached(struct native_device *device, struct worker *w, struct virtqueue *vq)
{
	struct net_device *net = (struct net_device *)device;
	struct net_pair *pair = pair_of(device, vq);

	if (is_receive(vq))
		pair->rx = vq;
	else
		pair->tx = vq;
	if (net->lan && net->attached == 0)
		net_switch_plug(net);
	if (net->backend->receive && !(pair->rx && pair->tx))
		source_add(w, &pair->source, device); /* the first queue of the pair */
	net->attached++;
}

static void net_detached(struct native_device *device, struct worker *w, struct virtqueue *vq)
{
	struct net_device *net = (struct net_device *)device;
	struct net_pair *pair = pair_of(device, vq);

	if (is_receive(vq)) {
		pair->rx = NULL;
		pair->pending = 0; /* the guest that it was for has gone */
	} else {
		pair->tx = NULL;
	}
	net->attached--;
	if (net->lan && net->attached == 0)
		net_switch_unplug(net);
	if (net->backend->receive && !pair->rx && !pair->tx)
		source_remove(w, &pair->source);
}

static bool net_ready(struct native_device *device, struct virtqueue *vq)
{
	struct net_pair *pair = pair_of(device, vq);

	return is_receive(vq) ? receive_ready(pair) : !transmit_blocked(pair) && virtqueue_has_work(vq);
}

static bool net_turn(struct native_device *device, struct worker *w, struct virtqueue *vq)
{
	return is_receive(vq) ? receive_turn(pair_of(device, vq), w) : transmit_turn(pair_of(device, vq), w);
}

static bool net_arm(struct native_device *device, struct virtqueue *vq)
{
	struct net_pair *pair = pair_of(device, vq);

	if (is_receive(vq))
		/* New buffers are of interest only to a frame that waits for them; else kicks would be for nothing. */
		return pair->pending ? virtqueue_arm(vq) : !receive_ready(pair);
	return transmit_blocked(pair) || virtqueue_arm(vq);
}

static const struct queue_ops net_queue_ops = {
	.attached = net_attached,
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
	free(net);
}

static const struct native_ops net_ops = { .queue = &net_queue_ops, .free = net_free };

static int pair_prepare(struct net_device *net, struct net_pair *pair, int fd)
{
	pair->net = net;
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

void net_set_features(struct native_device *device, uint64_t features)
{
	store_relaxed(&((struct net_device *)device)->features, features);
}

void net_set_link(struct native_device *device, uint32_t up)
{
	store_relaxed(&((struct net_device *)device)->link_up, up);
}

void net_set_active_pairs(struct native_device *device, uint32_t pairs)
{
	struct net_device *net = (struct net_device *)device;

	store_relaxed(&net->active_pairs, pairs >= 1 && pairs <= net->setup.pairs ? pairs : 1);
}

const struct net_counters *net_counters(struct native_device *device)
{
	return &((struct net_device *)device)->counters;
}
