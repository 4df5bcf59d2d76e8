/* The driver's side in C: guest memory, and a virtqueue of either format as a guest kernel would use it. */
#ifndef NATIVE_GUEST_H
#define NATIVE_GUEST_H

#include "ring/virtqueue.h" /* first: it asks for the GNU interfaces */

#include "check.h"

#define GUEST_GPA 0x40000000ull
#define GUEST_UVA 0x7f0000000000ull

struct guest {
	int fd;
	uint64_t size;
	struct mapping *mapping;     /* the device's */
	struct memory_table *table;
	/*
	 * Where the driver sees the memory. It is the device's own mapping where it can be: then ThreadSanitizer sees
	 * both sides of every ring and buffer at one address, and so checks the order that the rings must give.
	 */
	uint8_t *base;
	bool own_base;
};

struct guest *guest_new(uint64_t size, bool own_base);
void guest_free(struct guest *g);

static inline void *guest_at(const struct guest *g, uint64_t gpa)
{
	return g->base + (gpa - GUEST_GPA);
}

/* Every buffer has a tag, below DRIVER_TAGS; it owns up to DRIVER_PIECES descriptors, or one indirect table. */
#define DRIVER_TAGS 32
#define DRIVER_PIECES 8
#define DRIVER_QUEUE_SIZE (DRIVER_TAGS * DRIVER_PIECES)
/* Bytes of guest memory a driver takes for its rings and tables. */
#define DRIVER_AREA 0x10000u

struct piece {
	uint64_t gpa;
	uint32_t len;
	bool write;
};

struct driver {
	struct guest *guest;
	bool packed, event_idx;
	uint64_t desc, avail, used, tables; /* guest physical */
	uint16_t avail_idx, last_used, kicked_idx; /* split; packed: kicked_idx counts descriptors added since */
	bool avail_wrap, used_wrap;
	uint32_t slots_free;
	uint8_t slots[DRIVER_TAGS]; /* ring entries the buffer took; 0: not in flight */
};

void driver_init(struct driver *d, struct guest *g, uint64_t area_gpa, bool packed, bool event_idx);
/* What a transport hands to virtqueue_configure for a ring that was never used. */
struct queue_setup driver_setup(const struct driver *d);
void driver_add(struct driver *d, uint32_t tag, const struct piece *pieces, uint32_t count, bool indirect);
bool driver_needs_kick(struct driver *d);
/* The next used buffer, or false. */
bool driver_used(struct driver *d, uint32_t *tag, uint32_t *written);
/* Ask for an interrupt; true: there is something already. */
bool driver_wait_begin(struct driver *d);
void driver_wait_end(struct driver *d);

/* So many of this thread's next calls of malloc find no memory. */
extern __thread unsigned int malloc_fails;

/* While it is not 0 the kernel takes no submission of any io_uring; how many it has refused. Both are atomic. */
extern int submissions_fail;
extern uint32_t submissions_failed;

/* Deterministic randomness, the same everywhere. */
static inline uint32_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return (uint32_t)(*state >> 16);
}

#endif
