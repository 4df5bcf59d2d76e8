/* The network device (section 5.1) as Python has it: making and ending it, and what is set and asked from outside. */
#include "net/net.h"

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
	w->moved = 0; /* a turn of its own, and too short to be cut */
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

void net_set_mtu(struct native_device *device, uint32_t mtu)
{
	store_relaxed(&((struct net_device *)device)->mtu, mtu);
}

void net_mute(struct native_device *device, uint32_t pair, uint32_t on)
{
	struct net_device *net = (struct net_device *)device;

	if (pair >= net->setup.pairs)
		return;
	store_relaxed(&net->pairs[pair].awake, 1); /* once: what is there already has no effect either */
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

void net_counters_sum(struct native_device *device, struct net_counters *sum)
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
