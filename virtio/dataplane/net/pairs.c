/* How many pairs of queues are in use: those that listen, as far as the driver allows (section 5.1.6.5.6). */
#include "net/net.h"

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

void net_pair_listens(struct net_pair *pair, bool listening)
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
