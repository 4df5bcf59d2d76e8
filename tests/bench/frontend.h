/* The front-end's own declarations; the border to Python is frontend.cdef.h. */

#ifndef BENCH_FRONTEND_H
#define BENCH_FRONTEND_H

#include <stdint.h>
#include <stddef.h>

#include "frontend.cdef.h"

#define VRING_DESC_F_NEXT 1
#define VRING_DESC_F_WRITE 2
#define VRING_DESC_F_INDIRECT 4
#define VRING_AVAIL_F_NO_INTERRUPT 1
#define VRING_USED_F_NO_NOTIFY 1
#define VRING_PACKED_DESC_F_AVAIL 0x80
#define VRING_PACKED_DESC_F_USED 0x8000
#define VRING_PACKED_EVENT_FLAG_ENABLE 0
#define VRING_PACKED_EVENT_FLAG_DISABLE 1
#define VRING_PACKED_EVENT_FLAG_DESC 2

#define VIRTIO_BLK_T_IN 0
#define VIRTIO_BLK_T_OUT 1
#define SECTOR_SIZE 512

struct segment { /* one descriptor of a chain, before it has the form of a ring */
	uint64_t gpa;
	uint32_t length;
	uint16_t flags; /* 0 or VRING_DESC_F_WRITE */
};

struct blk_header { /* virtio 1.3, 5.2.6 */
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

/* What a request has in guest memory besides its data; the indirect table follows. */
struct control {
	struct blk_header header;
	uint8_t status;
	uint8_t pad[47];
};

struct request { /* the driver's own memory of one request */
	uint64_t block;
	uint64_t submitted_ns;
	uint32_t generation;
	uint16_t ring_descs; /* ring entries that its chain takes */
	uint8_t is_write;
	uint8_t in_flight;
};

struct split_avail {
	uint16_t flags;
	uint16_t idx;
	uint16_t ring[];
};

struct split_used_elem {
	uint32_t id;
	uint32_t len;
};

struct split_used {
	uint16_t flags;
	uint16_t idx;
	struct split_used_elem ring[];
};

struct split_desc {
	uint64_t gpa;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

struct packed_desc {
	uint64_t gpa;
	uint32_t len;
	uint16_t id;
	uint16_t flags;
};

struct packed_event {
	uint16_t off_wrap;
	uint16_t flags;
};

struct fe_queue;

struct ring_ops { /* split.c and packed.c */
	/* Make the chain of request `id` available. */
	void (*add)(struct fe_queue *q, uint32_t id, const struct segment *segments, uint32_t count);
	/* Whether the device wants a kick for what was added since the last call. */
	int (*kick_needed)(struct fe_queue *q);
	/* 1: *id came back; 0: nothing there; FE_E_*. */
	int (*get)(struct fe_queue *q, uint32_t *id, uint32_t *len);
	/* Ask for no interrupts; cheap when called again and again. */
	void (*disable_calls)(struct fe_queue *q);
	/* Ask for one at the next used element; 0: there is one already, so none may come. */
	int (*enable_calls)(struct fe_queue *q);
	uint32_t (*published)(const struct fe_queue *q); /* fe_fault.used_idx */
	uint32_t (*kick_wish)(const struct fe_queue *q); /* fe_fault.kick_wish */
};

struct fe_queue {
	const struct ring_ops *ops;
	struct fe_setup setup;
	uint32_t slots;       /* requests that can be in flight */
	uint32_t chain_max;   /* ring entries of the longest chain */
	uint64_t control_at;  /* offsets from setup.memory */
	uint64_t control_stride;
	uint64_t data_at;
	uint64_t data_stride;

	void *desc;           /* struct split_desc or packed_desc [queue_size] */
	void *avail;          /* struct split_avail or packed_event (the driver's) */
	void *used;           /* struct split_used or packed_event (the device's) */
	uint16_t avail_idx;   /* split: free running; packed: position in the ring */
	uint16_t last_used;
	uint16_t num_added;   /* since the last kick_needed */
	uint8_t avail_wrap;   /* packed */
	uint8_t used_wrap;
	uint16_t event_shadow; /* split: the used_event in the ring; packed: the flags */

	/* of the current run */
	struct request *requests;
	uint32_t *free_ids;
	uint32_t free_count;
	uint32_t in_flight;
	uint64_t submitted;
	uint64_t first_block;
	uint64_t blocks;
	uint64_t next_block;
	uint64_t random;
	uint8_t *busy;        /* blocks with a request in flight; only when the job writes */
	uint8_t armed;        /* interrupts are wanted, and the ring was empty after that */
	struct fe_result *result;
};

struct run { /* one call of fe_run */
	const struct fe_job *job;
	struct fe_queue **queues;
	uint32_t count;
	uint64_t now; /* of the last batch that came back */
	uint64_t start;
	uint64_t deadline; /* UINT64_MAX: only the number of requests ends the run */
	uint64_t looked;   /* when is_stalled looked last */
	uint64_t waited;   /* for how long nothing came back, as it saw */
	struct fe_fault *fault;
};

/* frontend.c: note where the queue stands and pass `code` on. */
int run_fail(struct run *r, const struct fe_queue *q, int code, uint64_t detail);
/* requests.c */
void request_submit(struct fe_queue *q, const struct fe_job *job, uint64_t now_ns);
int request_finish(struct fe_queue *q, struct run *r, uint32_t id, uint32_t len);

extern const struct ring_ops split_ops;
extern const struct ring_ops packed_ops;

static inline struct control *queue_control(const struct fe_queue *q, uint32_t id)
{
	return (struct control *)(q->setup.memory + q->control_at + id * q->control_stride);
}

static inline uint64_t queue_control_gpa(const struct fe_queue *q, uint32_t id)
{
	return q->setup.gpa + q->control_at + id * q->control_stride;
}

static inline int event_wanted(uint16_t event, uint16_t now, uint16_t before)
{
	/* virtio 1.3, 2.7.10: the event index lies among the entries that are new */
	return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

#endif
