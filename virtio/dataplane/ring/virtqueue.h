/*
 * Virtqueues: where a ring lies, both formats, chains out of it and answers into it, what the driver is told, counters.
 * Nothing here knows who drives a queue or what its requests mean.
 */
#ifndef HYPERBELL_VIRTQUEUE_H
#define HYPERBELL_VIRTQUEUE_H

#include "memory/memory.h"

#include <unistd.h>

/*
 * A chain longer than this is refused even in a larger queue: it is what one preadv takes (IOV_MAX), and what
 * QEMU's own devices take.
 */
#define CHAIN_DESCRIPTORS_MAX 1024
/*
 * A buffer may cross from one memory region into the next, or lie in pages that an IOMMU has scattered, so a chain may
 * have more pieces than descriptors. This many are 64 MiB in pages of 4 KiB, beyond what a driver asks for at once.
 */
#define CHAIN_IOV_MAX 16384
/* The kernel takes at most so many pieces in one call (IOV_MAX). */
#define KERNEL_IOV_MAX 1024u

struct chain_view { /* one popped chain; iov belongs to whoever popped */
	uint32_t head;            /* split: descriptor index; packed: buffer id */
	uint32_t slots;           /* ring entries (split: of the descriptor table) it took */
	uint32_t descriptors;     /* gathered so far, those of an indirect table included */
	uint32_t readable_count;  /* iov entries, readable ones first */
	uint32_t writable_count;
	uint64_t readable_len;
	uint64_t writable_len;
	struct iovec *iov;        /* capacity CHAIN_IOV_MAX */
};

struct split_ring {
	const uint64_t *desc;     /* 16 bytes each, read as two words */
	const uint16_t *avail;    /* flags, idx, ring[size], used_event */
	uint16_t *used;           /* flags, idx, ring of {u32 id, u32 len}, avail_event */
	uint16_t last_avail;
	uint16_t avail_seen;      /* the driver's index when last read */
	uint16_t used_idx;        /* next to write, not yet published */
	uint16_t signalled_used;  /* used index at the last decision to notify */
	bool signalled_valid;
	bool started;
};

struct packed_ring {
	uint64_t *desc;           /* 16 bytes each */
	uint32_t *driver_event;   /* off_wrap | flags << 16 */
	uint32_t *device_event;
	uint16_t avail_idx, used_idx;
	bool avail_wrap, used_wrap;
	uint16_t publish_idx;     /* first staged used descriptor; its flags are written last */
	uint16_t publish_flags;
	uint16_t staged;          /* ring slots used since the last publish */
	uint16_t signalled_off;   /* slots used since the last decision to notify */
};

/* The smallest piece in which an IOMMU scatters a ring. A fuzzer may have smaller ones, to scatter small rings. */
#ifndef RING_PAGE_SHIFT
#define RING_PAGE_SHIFT 12
#endif
#define RING_PAGE (1u << RING_PAGE_SHIFT)
/* The three areas of the largest split ring (2.7), each of which begins and ends in the middle of a page. */
#define QUEUE_SIZE_MAX 32768u
#define RING_PAGES_MAX (((16 + 2 + 8) * QUEUE_SIZE_MAX + 6 + 6) / RING_PAGE + 3 * 2)

enum { AREA_DESC, AREA_AVAIL, AREA_USED, RING_AREAS };

struct ring_pages { /* a scattered ring, page by page; an address is in our memory, of the page's first byte */
	uint32_t first[RING_AREAS]; /* the area's first page */
	uint32_t skew[RING_AREAS];  /* where in it the area begins */
	uint32_t count;
	uintptr_t page[RING_PAGES_MAX];
};

struct ring_ops;

struct inflight { /* a link in a queue's list of what is in flight; driver thread */
	struct inflight *older, *newer;
	uint64_t start_ns;
	uint64_t available_ns; /* 0: not of interest */
};

struct guest_wait { /* since when the chains of a queue wait: ring/guest_wait.c; driver thread */
	uint32_t waiting;       /* of the chains to pop next, so many ... */
	uint64_t waiting_ns;    /* ... were not there yet at this look, and there at `looked_ns` */
	uint64_t looked_ns;     /* all behind them was not there yet at this look */
	bool unfinished;        /* there was more in the ring then, or no later look */
	uint64_t available_ns;  /* since when the chain popped last was available, at most */
};

struct virtqueue {
	/* fixed */
	uint32_t index;
	int event_fd;
	/* set by Python while nobody drives the queue, read by the driver thread */
	uint32_t size;
	uint32_t space;
	bool event_idx, indirect, in_order, configured;
	uint8_t call_kind, err_kind; /* NOTIFY_*, of the two fds below; driver thread */
	uint64_t desc_addr, avail_addr, used_addr;
	const struct ring_ops *ops; /* flat or scattered: driver thread */
	struct iotlb *iotlb;
	uint64_t *inflight_heads; /* bitmap: heads (split) or buffer ids (packed) the driver has not got back */
	/* driver thread */
	struct memory_table *table;
	uint32_t iotlb_generation;
	uint32_t deaths_seen;
	bool resolved;            /* the ring pointers below are those of the table and IOTLB of now */
	struct memory_table *ring_table; /* the table they point into: kept until they are replaced */
	bool parked;              /* missed the IOTLB; pops nothing until resumed */
	int doorbell_fds[DOORBELL_KINDS]; /* whichever rings, the queue is looked at */
	int call_fd, err_fd;
	struct interrupt_status *interrupt_status; /* virtio-mmio only: set before call_fd is written */
	bool unsaid;              /* something was pushed since the driver was last notified */
	uint32_t inflight;
	uint32_t popped;          /* chains, and not given back to the ring; it wraps */
	uint32_t epoch;           /* grows whenever the queue forgets its ring */
	union {
		struct split_ring split;
		struct packed_ring packed;
	};
	struct inflight *oldest, *newest; /* what waits for its I/O, by age */
	struct guest_wait wait;
	struct queue_stats stats;
	/* driver thread writes, then stores `event` with release; Python reads after acquire */
	uint32_t fault;           /* atomic */
	uint32_t miss;            /* atomic */
	uint32_t misses;          /* driver thread: how many there were */
	uint32_t call_error;      /* atomic: why the call fd is no more, an errno; 0: it is, or there was none */
	uint32_t moved;           /* atomic */
	struct queue_report report;
	/* what a worker keeps here while it drives the queue (worker thread) */
	struct native_device *device;
	struct worker_command *detaching;
	struct request *unfinished; /* a chain that is too long for one turn; none is popped before it is done */
	struct worker_command *ringing; /* a change of a doorbell, whose old eventfd is still watched */
	struct virtqueue *worker_next;
	struct request *pool, *free_requests; /* its requests that wait for I/O: so many at a time are its share */
	uint32_t pool_size, pool_used;        /* those from pool_used on were never taken */
	uint32_t ones[DOORBELL_KINDS]; /* how often in a row an eventfd of the kind counted no more than 1 */
	uint32_t poll_errors[DOORBELL_KINDS];  /* how often in a row watching it ended with an error */
	uint32_t doorbells_armed; /* a bit for each kind whose eventfd the reactor watches */
	bool kicked;              /* one fired since the queue was last served */
	bool touched;             /* elements were pushed and not yet published */
	/* driver thread: where a scattered ring lies, else not used; it goes with ring_table */
	struct ring_pages pages;
};

struct ring_ops {
	/* The three areas' sizes in bytes. */
	void (*areas)(const struct virtqueue *vq, uint64_t sizes[RING_AREAS]);
	/* A scattered ring is given no pointers. */
	void (*attach)(struct virtqueue *vq, uint8_t *desc, uint8_t *avail, uint8_t *used);
	int (*set_base)(struct virtqueue *vq, uint32_t base);
	uint32_t (*base)(const struct virtqueue *vq);
	int (*pop)(struct virtqueue *vq, struct chain_view *chain);
	void (*push)(struct virtqueue *vq, uint32_t head, uint32_t slots, uint32_t written);
	void (*publish)(struct virtqueue *vq);
	void (*rewind)(struct virtqueue *vq, uint32_t chains, uint32_t slots);
	bool (*needs_notify)(struct virtqueue *vq);
	bool (*has_work)(const struct virtqueue *vq);
	/* How many chains there are to pop, or their descriptors, if those are easier to count. */
	uint32_t (*waiting)(const struct virtqueue *vq);
	void (*arm)(struct virtqueue *vq);
	void (*disarm)(struct virtqueue *vq);
	/* The same format where each area is contiguous in our memory, and where the ring lies in vq->pages. */
	const struct ring_ops *flat, *scattered;
};

extern const struct ring_ops split_ops, packed_ops, split_scattered_ops, packed_scattered_ops;

/* Pop into `chain`: VQ_CHAIN, VQ_EMPTY, VQ_MISS (parked) or VQ_BROKEN. */
int virtqueue_pop(struct virtqueue *vq, struct chain_view *chain);
/* Stage one used element; virtqueue_publish makes all staged ones visible, virtqueue_notify decides and signals. */
void virtqueue_push(struct virtqueue *vq, uint32_t head, uint32_t slots, uint32_t written);
void virtqueue_publish(struct virtqueue *vq);
void virtqueue_notify(struct virtqueue *vq);
bool virtqueue_runnable(struct virtqueue *vq);
/* After guest memory was read: 0, or VQ_BROKEN because it was no longer there. Only while it is configured. */
int virtqueue_memory_alive(struct virtqueue *vq);
bool virtqueue_has_work(struct virtqueue *vq);

/* For the ring formats: account one descriptor to the chain. 0, or VQ_MISS / VQ_BROKEN. */
struct desc { /* our private copy of a descriptor; both formats share the flag bits */
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next; /* split: next; packed: buffer id */
};

#define VRING_DESC_F_NEXT 1
#define VRING_DESC_F_WRITE 2
#define VRING_DESC_F_INDIRECT 4

void chain_begin(struct chain_view *chain);
int chain_add(struct virtqueue *vq, struct chain_view *chain, const struct desc *d, uint32_t head);
/*
 * Walk an indirect table (2.7.5.3, 2.8.7): split tables follow `next`, packed ones are taken in order.
 */
int chain_add_indirect(struct virtqueue *vq, struct chain_view *chain, const struct desc *table, uint32_t head,
		       bool packed);
/* Give back to the ring, unused, the last `count` chains popped: the next pop finds them again. */
void virtqueue_unpop(struct virtqueue *vq, const uint32_t *heads, uint32_t count, uint32_t slots);
/* Python has something to look at: virtqueue_report. */
void virtqueue_raise_event(struct virtqueue *vq);
/* Break the queue with this reason; always returns VQ_BROKEN. */
int virtqueue_fail(struct virtqueue *vq, uint32_t fault, uint32_t head, uint64_t address, uint64_t length);
/* Park it: the IOMMU has no translation with `perm` for `iova`; always returns VQ_MISS. */
int virtqueue_miss(struct virtqueue *vq, uint64_t iova, uint32_t perm);
/* Find the ring in the memory of now: 0, VQ_MISS (now parked) or VQ_BROKEN. Until it is found, the old places stay. */
int virtqueue_resolve(struct virtqueue *vq);
/* A split ring begins at its used index and not at the base it was given. */
void virtqueue_moved(struct virtqueue *vq, uint16_t base, uint16_t used);
/* Contiguous bytes at *hva (> 0), or VQ_MISS (now parked), or VQ_BROKEN (outside memory; nothing broken yet). */
int virtqueue_translate(struct virtqueue *vq, uint64_t addr, uint64_t len, uint32_t perm, uint8_t **hva);

/* Close what is in the slot, and put `fd` there. */
static inline void fd_replace(int *slot, int fd)
{
	if (*slot >= 0)
		close(*slot);
	*slot = fd;
}

/*
 * A descriptor's two words become our private copy: read once, check the copy, use the copy.
 * Little endian, like the guest; the formats differ in where flags and next (packed: id) stand.
 */
static inline struct desc desc_unpack(uint64_t lo, uint64_t hi, bool packed)
{
	uint16_t third = (uint16_t)(hi >> 32), fourth = (uint16_t)(hi >> 48);

	return (struct desc){ .addr = lo, .len = (uint32_t)hi, .flags = packed ? fourth : third,
			      .next = packed ? third : fourth };
}

/* 2.7.10: did the index pass `event` on its way from `old` to `new`? */
static inline bool vring_need_event(uint16_t event, uint16_t new_idx, uint16_t old)
{
	return (uint16_t)(new_idx - event - 1) < (uint16_t)(new_idx - old);
}

struct interrupt_status *interrupt_status_ref(struct interrupt_status *status);

/* Bucket k holds durations below 2^(10+k) ns; the last one everything longer. */
static inline unsigned histogram_bucket(uint64_t duration_ns)
{
	unsigned width = duration_ns >> 10 ? 64 - (unsigned)__builtin_clzll(duration_ns >> 10) : 0;

	return width < DP_HISTOGRAM_BUCKETS ? width : DP_HISTOGRAM_BUCKETS - 1;
}

/* Keep stats.inflight and stats.oldest_ns; start_ns of the link is set by the caller. */
void inflight_add(struct virtqueue *vq, struct inflight *link);
void inflight_remove(struct virtqueue *vq, struct inflight *link);
void op_stats_add(struct op_stats *op, uint64_t duration_ns, uint64_t bytes, bool failed);

/*
 * ring/guest_wait.c: a turn of a queue begins; its driver looked at all its queues at `looked_ns` before / ends, at now_ns or
 * later, and has seen the end of the ring or not / a request that was available since then is complete.
 */
void guest_wait_begin(struct virtqueue *vq, uint64_t looked_ns);
void guest_wait_end(struct virtqueue *vq, bool empty, uint64_t now_ns);
void guest_wait_complete(struct virtqueue *vq, uint64_t available_ns, uint64_t now_ns);
/* Nothing is known of the time before now_ns. */
void guest_wait_reset(struct virtqueue *vq, uint64_t now_ns);

/* A chain was popped. */
static inline void guest_wait_popped(struct virtqueue *vq)
{
	struct guest_wait *wait = &vq->wait;

	if (unlikely(wait->waiting)) {
		wait->waiting--;
		wait->available_ns = wait->waiting_ns;
	} else {
		wait->available_ns = wait->looked_ns;
	}
}

#endif
