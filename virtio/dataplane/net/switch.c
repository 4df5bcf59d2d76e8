/*
 * A learning switch between the guests of this daemon: frames go from ring to ring. Its ports share one worker, which
 * the configuration sees to, so there is no lock.
 */
#include "net/net.h"

#include <stdlib.h>

#define SETS 256 /* a power of two */
#define WAYS 4

struct station {
	uint8_t mac[6];
	uint16_t port; /* + 1; 0: the place is free */
};

#define PINS 2048 /* a power of two, more than there are ports */
#define PIN_MAC 0xffffffffffffull
#define PIN_AWAY 0xffffull /* its port is unplugged */

struct net_switch {
	int refs;                    /* atomic */
	const struct worker *worker; /* atomic: who drives its ports, the first that ever did */
	struct net_device *ports[NET_SWITCH_PORTS_MAX];
	uint32_t ports_end;          /* no port at or behind it was ever plugged in */
	/*
	 * Addresses that are one port's alone, whoever sends with them: the address below, the port + 1 above; 0: free. They
	 * stay while the port is unplugged, so that nobody takes its place meanwhile.
	 */
	uint64_t pins[PINS];
	uint32_t pin_count;
	struct station stations[SETS][WAYS];
	uint8_t victim[SETS]; /* who makes room next */
};

struct net_switch *net_switch_new(void)
{
	struct net_switch *lan = calloc(1, sizeof(*lan));

	if (lan)
		lan->refs = 1;
	return lan;
}

struct net_switch *net_switch_ref(struct net_switch *lan)
{
	__atomic_add_fetch(&lan->refs, 1, __ATOMIC_RELAXED);
	return lan;
}

void net_switch_unref(struct net_switch *lan)
{
	if (lan && __atomic_sub_fetch(&lan->refs, 1, __ATOMIC_ACQ_REL) == 0)
		free(lan);
}

/* ---- addresses that are one port's ---- */

static uint64_t mac_word(const uint8_t mac[6])
{
	uint64_t word = 0;

	memcpy(&word, mac, 6); /* little-endian */
	return word;
}

/* Where that address is pinned, or the free place where it would be. Less than half of them are ever taken. */
static uint64_t *pin_find(struct net_switch *lan, const uint8_t mac[6])
{
	uint64_t word = mac_word(mac);
	uint32_t at = (uint32_t)((word * 0x9e3779b97f4a7c15ull) >> 53) & (PINS - 1);

	while (lan->pins[at] && (lan->pins[at] & PIN_MAC) != word)
		at = (at + 1) & (PINS - 1);
	return &lan->pins[at];
}

static void pin_set(struct net_switch *lan, const uint8_t mac[6], uint64_t port)
{
	uint64_t *pin = pin_find(lan, mac);

	if (!*pin && lan->pin_count == NET_SWITCH_PORTS_MAX)
		return;
	if (!*pin)
		lan->pin_count++;
	*pin = mac_word(mac) | port << 48;
}

/* A port is plugged in while any of its pairs is driven. */
void net_switch_plug(struct net_device *net, const struct worker *w)
{
	const struct worker *nobody = NULL;

	if (net->lan_pairs++)
		return;
	/* The configuration sees to it that this never happens; if it did, nothing but frames would be lost. */
	if (!__atomic_compare_exchange_n(&net->lan->worker, &nobody, w, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED) &&
	    nobody != w)
		return;
	for (uint32_t port = 0; port < NET_SWITCH_PORTS_MAX; port++) {
		if (net->lan->ports[port])
			continue;
		memset(net->flow_pairs, 0, sizeof(net->flow_pairs));
		net->lan->ports[port] = net;
		net->lan_port = port;
		if (port >= net->lan->ports_end)
			net->lan->ports_end = port + 1;
		if (net->setup.keeps_mac)
			pin_set(net->lan, net->setup.mac, port + 1);
		return;
	}
}

void net_switch_unplug(struct net_device *net)
{
	if (--net->lan_pairs || net->lan_port == NET_NO_PORT)
		return;
	net->lan->ports[net->lan_port] = NULL;
	if (net->setup.keeps_mac && *pin_find(net->lan, net->setup.mac) >> 48 == net->lan_port + 1)
		pin_set(net->lan, net->setup.mac, PIN_AWAY);
	for (uint32_t set = 0; set < SETS; set++)
		for (uint32_t way = 0; way < WAYS; way++)
			if (net->lan->stations[set][way].port == net->lan_port + 1)
				net->lan->stations[set][way].port = 0;
	net->lan_port = NET_NO_PORT;
}

/* ---- who is where ---- */

static uint32_t set_of(const uint8_t mac[6])
{
	uint32_t hash = 2166136261u; /* FNV-1a */

	for (int i = 0; i < 6; i++)
		hash = (hash ^ mac[i]) * 16777619u;
	return (hash ^ hash >> 16) & (SETS - 1);
}

static struct station *station_find(struct net_switch *lan, const uint8_t mac[6])
{
	struct station *set = lan->stations[set_of(mac)];

	for (uint32_t way = 0; way < WAYS; way++)
		if (set[way].port && memcmp(set[way].mac, mac, 6) == 0)
			return &set[way];
	return NULL;
}

static void station_learn(struct net_switch *lan, const uint8_t mac[6], uint32_t port)
{
	struct station *station = station_find(lan, mac);
	uint32_t set = set_of(mac);

	if (!station) {
		/* A guest that makes up addresses only makes others' frames be flooded until they speak again. */
		station = &lan->stations[set][lan->victim[set]++ % WAYS];
		memcpy(station->mac, mac, 6);
	}
	station->port = (uint16_t)(port + 1);
}

/* ---- frames ---- */

static bool is_group(const uint8_t mac[6])
{
	return mac[0] & 1;
}

static void hand_over(struct net_device *to, uint32_t pair, struct worker *w, const struct net_frame *frame)
{
	uint32_t active = load_relaxed(&to->active_pairs), flow = active > 1 ? net_flow(frame) : NET_NO_FLOW;

	/* 5.1.6.5.6.2: answers come to the pair that the flow was sent on. What was never answered goes to the queue */
	/* that it was sent on at the other side: so frames of one queue, or of one flow, stay in order. */
	if (flow != NET_NO_FLOW && to->flow_pairs[flow])
		pair = to->flow_pairs[flow] - 1;
	net_deliver(&to->pairs[pair % active], w, frame);
}

/*
 * To all ports but its own. A long frame for many ports takes several turns; the driver that changes it meanwhile only
 * harms itself.
 */
static bool flood(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct net_device *net = pair->net;
	struct net_switch *lan = net->lan;
	uint32_t index = (uint32_t)(pair - net->pairs);

	if (!frame->port)
		stat_add(&pair->counters.flooded, 1);
	for (uint32_t port = frame->port; port < lan->ports_end; port++) {
		if (!lan->ports[port] || port == net->lan_port)
			continue;
		if (w->moved >= WORKER_TURN_BYTES) {
			pair->flooding = port;
			return false;
		}
		hand_over(lan->ports[port], index, w, frame);
	}
	return true;
}

static bool switch_send(struct net_pair *pair, struct worker *w, const struct net_frame *frame)
{
	struct net_device *net = pair->net;
	struct net_switch *lan = net->lan;
	struct pieces from = pieces_of(frame->iov, frame->count);
	uint32_t index = (uint32_t)(pair - net->pairs), flow;
	uint8_t macs[12]; /* destination, source */
	const struct station *station;
	uint64_t pin, to;

	if (net->lan_port == NET_NO_PORT) {
		stat_add(&pair->counters.dropped, 1);
		return true;
	}
	pieces_read(&from, macs, sizeof(macs));
	pin = lan->pin_count ? *pin_find(lan, macs + 6) >> 48 : 0;
	if (unlikely(pin && pin != net->lan_port + 1)) {
		stat_add(&pair->counters.spoofed, 1);
		return true;
	}
	if (net->setup.pairs > 1 && (flow = net_flow(frame)) != NET_NO_FLOW)
		net->flow_pairs[flow] = (uint8_t)(index + 1);
	if (!pin && !is_group(macs + 6))
		station_learn(lan, macs + 6, net->lan_port);
	to = lan->pin_count ? *pin_find(lan, macs) >> 48 : 0;
	if (to == PIN_AWAY) {
		stat_add(&pair->counters.dropped, 1);
		return true;
	}
	if (!to && !is_group(macs) && (station = station_find(lan, macs)))
		to = station->port;
	if (to) {
		if (to != net->lan_port + 1)
			hand_over(lan->ports[to - 1], index, w, frame);
		return true;
	}
	return flood(pair, w, frame);
}

const struct net_backend net_switch_backend = { .send = switch_send };
