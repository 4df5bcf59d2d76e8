/* The network device's queues (section 5.1.6): who has a turn when, and what becomes of a frame that has to wait. */
#include "net/net.h"

#include <poll.h>

/* ---- how long a turn is ---- */

#define CLOCK_EACH 16 /* frames between two looks at the clock */

/*
 * After `moved` frames. In memory a frame costs what is counted of it; one that goes through a descriptor costs what the
 * kernel does with it meanwhile, so the clock has its say. *since: when that was looked at first, or 0.
 */
static bool turn_over(const struct net_pair *pair, const struct worker *w, uint32_t moved, uint64_t *since)
{
	uint64_t now;

	if (moved == NET_TURN || w->moved >= WORKER_TURN_BYTES)
		return true;
	if (!pair->net->backend->receive || moved % CLOCK_EACH)
		return false;
	now = now_ns();
	if (!*since)
		*since = now;
	return now - *since >= w->turn_ns;
}

/* ---- from the guest ---- */

/*
 * A disabled queue's ring may be memory that is not a ring any more: some front-ends only disable the rings of a driver
 * that has gone. So it is looked at when it is kicked, and not otherwise.
 */
static bool transmit_asleep(const struct net_pair *pair)
{
	return load_relaxed(&pair->muted) && !load_relaxed(&pair->awake);
}

static bool transmit_blocked(const struct net_pair *pair)
{
	return pair->net->backend->receive && !(pair->source.ready & POLLOUT) && !load_relaxed(&pair->muted);
}

static bool transmit_turn(struct net_pair *pair, struct worker *w)
{
	struct virtqueue *vq = pair->tx;
	struct net_device *net = pair->net;
	struct chain_view chain = { .iov = w->scratch };
	struct iovec iov[NET_IOV_MAX];
	struct net_frame frame;
	uint64_t since = 0, turn_ns = w->clock_ns;
	uint32_t moved = 0;
	int rc = VQ_CHAIN;

	w->moved = 0;
	if (vq->kicked)
		store_relaxed(&pair->awake, 1);
	if (transmit_asleep(pair))
		return false;
	guest_wait_begin(vq, w->looked_ns);
	while (!transmit_blocked(pair) && (rc = virtqueue_pop(vq, &chain)) == VQ_CHAIN) {
		bool honest = net_frame_read(net, &chain, iov, &frame);
		uint32_t head = chain.head, slots = chain.slots;

		guest_wait_popped(vq);
		frame.port = pair->flooding;
		pair->flooding = 0;
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
			if (net->backend->receive)
				w->moved += frame.length;
		}
		w->moved += NET_DELIVERY_COST;
		/* Until its turn came: the frames of a turn share one look at the clock, before it. */
		guest_wait_complete(vq, vq->wait.available_ns, turn_ns);
		virtqueue_push(vq, head, slots, 0);
		worker_touch(w, vq);
		if (turn_over(pair, w, ++moved, &since))
			break;
	}
	guest_wait_end(vq, rc == VQ_EMPTY, turn_ns);
	return moved > 0 || pair->flooding;
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
	uint64_t since = 0;
	uint32_t moved = 0;

	if (!pair->net->backend->receive)
		return false;
	w->moved = 0;
	while (receive_one(pair, w)) {
		w->moved += NET_DELIVERY_COST; /* also of one that was not delivered */
		if (turn_over(pair, w, ++moved, &since))
			break;
	}
	return moved > 0;
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
		net_pair_listens(pair, true);
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
		net_pair_listens(pair, false);
	} else {
		pair->tx = NULL;
		pair->flooding = 0;
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
	if (is_receive(vq))
		return receive_ready(pair);
	return !transmit_asleep(pair) && !transmit_blocked(pair) && virtqueue_has_work(vq);
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
	if (transmit_asleep(pair) || transmit_blocked(pair))
		return true;
	if (!virtqueue_arm(vq))
		return false;
	store_relaxed(&pair->awake, 0);
	return true;
}

static void net_disarm(struct native_device *device, struct virtqueue *vq)
{
	struct net_pair *pair = pair_of((struct net_device *)device, vq);

	/* A disabled queue that is not looked at keeps asking for kicks, for they alone wake it; nor is it written to. */
	if (pair && !is_receive(vq) && transmit_asleep(pair))
		return;
	virtqueue_disarm(vq);
}

const struct queue_ops net_queue_ops = {
	.attached = net_attached,
	.detaching = net_detaching,
	.detached = net_detached,
	.ready = net_ready,
	.turn = net_turn,
	.arm = net_arm,
	.disarm = net_disarm,
};
