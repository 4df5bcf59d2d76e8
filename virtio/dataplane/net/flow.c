/* Which conversation a frame belongs to, so that its answers can come where its driver sent it from. */
#include "net/net.h"

#include <net/ethernet.h>
#include <netinet/in.h>

#define IP4_MIN 20
#define IP6_SIZE 40
#define IP_MAX 60
#define FRAGMENT 0x3fff /* 13 bits of its offset, and "more fragments" */

uint32_t net_network_offset(const uint8_t *bytes, uint32_t length, uint16_t *ether_type)
{
	uint32_t at = ETHERNET_SIZE;

	*ether_type = net_read16(bytes + 12);
	for (int tags = 0; tags < 2 && (*ether_type == ETHERTYPE_VLAN || *ether_type == ETHERTYPE_QINQ); tags++) {
		if (at + 4 > length)
			break; /* the tag is cut off, and its type is none that anybody looks behind */
		*ether_type = net_read16(bytes + at + 2);
		at += 4;
	}
	return at;
}

/* The words added bit by bit, so that it does not matter which address comes first. */
static uint32_t fold(const uint8_t *bytes, uint32_t length)
{
	uint32_t folded = 0, word;

	for (; length; length -= 4, bytes += 4) {
		memcpy(&word, bytes, 4);
		folded ^= word;
	}
	return folded;
}

uint32_t net_flow(const struct net_frame *frame)
{
	struct pieces from = pieces_of(frame->iov, frame->count);
	uint8_t bytes[ETHERNET_SIZE + 8 + IP_MAX + 4];
	uint32_t length = (uint32_t)pieces_read(&from, bytes, sizeof(bytes)), network, transport, hash;
	bool fragment = false;
	uint16_t ether_type;
	uint8_t protocol;

	network = net_network_offset(bytes, length, &ether_type);
	if (ether_type == ETHERTYPE_IP && length >= network + IP4_MIN) {
		transport = network + (bytes[network] & 15) * 4u;
		fragment = net_read16(bytes + network + 6) & FRAGMENT;
		protocol = bytes[network + 9];
		hash = fold(bytes + network + 12, 8);
	} else if (ether_type == ETHERTYPE_IPV6 && length >= network + IP6_SIZE) {
		transport = network + IP6_SIZE; /* behind further headers there is no looking for ports */
		protocol = bytes[network + 6];
		hash = fold(bytes + network + 8, 32);
	} else {
		return NET_NO_FLOW;
	}
	if (!fragment && (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP) && length >= transport + 4)
		hash ^= (uint32_t)(net_read16(bytes + transport) ^ net_read16(bytes + transport + 2)) * 0x85ebca6bu;
	hash *= 0x9e3779b1u; /* the upper bits are mixed now */
	return hash >> 16 & (NET_FLOWS - 1);
}
