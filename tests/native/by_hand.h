/*
 * A worker that goes round by hand, on the test's thread. Its reactor only notes what it is given, and the test answers
 * when it likes, so that rounds, requests and bytes can be counted.
 */
#ifndef NATIVE_BY_HAND_H
#define NATIVE_BY_HAND_H

#include "load.h"
#include "blk/blk.h"

#define QUEUES 2
#define AREA (DRIVER_AREA + (8u << 20)) /* of a queue: rings, then 4 KiB of headers, then data */
#define DATA_AT (DRIVER_AREA + 0x1000u)
#define DISK_SIZE (64u << 20)
#define MIB (1u << 20)

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_DISCARD = 11, T_WRITE_ZEROES = 13 };

struct reactor_state { /* what came to the reactor and was not answered */
	struct request *given[QUEUES * DRIVER_TAGS];
	uint32_t count;
	uint64_t bytes; /* of them */
};

struct table { /* a worker with two queues, each of a disk of its own: the first one's driver is greedy */
	struct guest *guest;
	struct worker worker;
	struct reactor_state reactor;
	struct native_device *disks[QUEUES];
	struct virtqueue *queues[QUEUES];
	struct driver drivers[QUEUES];
	int fds[QUEUES]; /* of the images, or -1 */
	uint64_t most; /* that comes to the reactor in a round: what begins, and what goes on */
};

/* The first disk is of that kind, the second one in memory; UINT64_MAX: no turn ends by time. */
void table_open(struct table *t, enum disk_kind greedy, uint64_t turn_ns);
/* Both of these setups, whose images the table makes. */
void table_open_disks(struct table *t, const struct blk_setup setups[QUEUES], uint64_t turn_ns);
/* ... and with one of the worker's own reactors in place of the one that only notes. */
void table_open_on(struct table *t, const struct reactor_ops *reactor, const struct blk_setup setups[QUEUES]);
struct blk_setup disk_setup(enum disk_kind kind);
void table_close(struct table *t);

/* Post a command of that queue and its disk, and go round until it is done. */
void command(struct table *t, uint32_t op, uint32_t queue);
static inline uint64_t area(uint32_t queue)
{
	return GUEST_GPA + (uint64_t)queue * AREA;
}

/* A request: 4 MiB of guest memory, again and again. The answer goes to the byte behind its header. */
void ask_at(struct table *t, uint32_t queue, uint32_t tag, uint32_t type, uint32_t sector, uint32_t bytes);
void ask(struct table *t, uint32_t queue, uint32_t tag, uint32_t type, uint32_t bytes);
uint8_t status(struct table *t, uint32_t queue, uint32_t tag);
/* How many came back; each is OK. */
uint32_t collect(struct table *t, uint32_t queue);
/* Do what the reactor was given until now, and say so to the device. */
void answer(struct worker *w);
/* ... but what is of these kinds (bits 1 << IO_*) fails with this errno. */
void answer_failing(struct worker *w, uint32_t kinds, int error);
/* In each round the other queue has its turn, whatever the greedy one has asked for: how many rounds that takes. */
uint32_t rounds_until(struct table *t, uint32_t greedy, bool answering);

#endif
