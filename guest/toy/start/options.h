/* The command line, which PVH's start_info points at: words "key=value"; words of other keys are somebody else's. */
#ifndef TOY_OPTIONS_H
#define TOY_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#define OPTIONS_DEVICES 8

enum doorbell_choice { DOORBELL_MMIO, DOORBELL_PIO, DOORBELL_HYPERCALL, DOORBELL_AUTO };
enum net_choice { NET_NONE, NET_REFLECT, NET_DROP };
enum mode { MODE_CHECK, MODE_NONSENSE, MODE_FLOOD, MODE_OUTSIDE, MODE_LOOP, MODE_RESET };

struct device_option {
	uint32_t id;   /* virtio device id */
	uint32_t base; /* of its registers */
	uint32_t gsi;
	uint32_t port; /* of its notify port; 0: none */
};

struct options {
	struct device_option devices[OPTIONS_DEVICES];
	uint32_t device_count;
	enum doorbell_choice doorbell;
	enum doorbell_choice plain;
	enum net_choice net;
	enum mode mode;
	uint32_t requests;
	uint32_t every;
	uint32_t rearm;
	uint32_t seed;
	uint32_t patience;
	uint32_t event_idx;
	uint32_t lenient;
};

extern struct options options;

int options_parse(uint32_t start_info_gpa);

#endif
