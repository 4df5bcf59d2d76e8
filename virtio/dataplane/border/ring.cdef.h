/* Virtqueues: ring/. */

#define VQ_EMPTY 0
#define VQ_CHAIN 1
#define VQ_MISS -5101
#define VQ_BROKEN -5100

#define VQ_FAULT_NONE 0
#define VQ_FAULT_AVAIL_INDEX 1
#define VQ_FAULT_HEAD 2
#define VQ_FAULT_HEAD_INFLIGHT 3
#define VQ_FAULT_NEXT 4
#define VQ_FAULT_CHAIN_LENGTH 5
#define VQ_FAULT_INDIRECT_FEATURE 6
#define VQ_FAULT_INDIRECT_NESTED 7
#define VQ_FAULT_INDIRECT_NEXT 8
#define VQ_FAULT_INDIRECT_SIZE 9
#define VQ_FAULT_ORDER 10
#define VQ_FAULT_ADDRESS 11
#define VQ_FAULT_EMPTY_BUFFER 12
#define VQ_FAULT_TOTAL_LENGTH 13
#define VQ_FAULT_RING_ADDRESS 14
#define VQ_FAULT_MEMORY_GONE 15
#define VQ_FAULT_SHAPE 16
#define VQ_FAULT_CALL_FD 17
#define VQ_FAULT_REQUEST_MAX 18
#define VQ_FAULT_DEVICE 19
#define VQ_FAULT_RING_PIECES 20
#define VQ_FAULT_PIECES 21
#define VQ_FAULT_KICK_FD 22
#define VQ_FAULT_KICK_POLL 23

#define VQ_SPACE_GPA 0
#define VQ_SPACE_UVA 1
#define VQ_SPACE_IOVA 2

struct virtqueue;

struct op_stats { /* written by the driver thread, relaxed; read by anyone */
	uint64_t requests;
	uint64_t errors;
	uint64_t bytes;
	uint64_t duration_sum_ns;
	uint64_t buckets[DP_HISTOGRAM_BUCKETS];
};

#define DOORBELL_KICK 0      /* the plain one: vhost-user's kick fd, virtio-mmio's QueueNotify */
#define DOORBELL_PIO 1
#define DOORBELL_HYPERCALL 2
#define DOORBELL_KINDS 3

struct queue_stats { /* as op_stats */
	uint64_t kicks[DOORBELL_KINDS]; /* sums of what the eventfd of each kind of doorbell counted */
	uint64_t wakeups;       /* times the driver thread came to the queue because of a doorbell */
	uint64_t empty_wakeups; /* ... and found nothing */
	uint64_t notifications_sent;
	uint64_t notifications_suppressed;
	uint64_t notifications_lost; /* of those sent: nobody was at the other end */
	uint64_t inflight;
	uint64_t oldest_ns;     /* CLOCK_MONOTONIC of the oldest request in flight; 0: none */
	struct op_stats ops[DP_QUEUE_OPS];
	/* From when a request was available, as far as the device can know, to its completion: ring/guest_wait.c. */
	uint64_t guest_sum_ns;
	uint64_t guest_buckets[DP_HISTOGRAM_BUCKETS];
};

struct queue_setup {
	uint64_t desc;
	uint64_t avail;
	uint64_t used;
	uint64_t features;
	uint32_t size;
	uint32_t base;  /* vhost-user encoding */
	uint32_t space; /* VQ_SPACE_* of the three addresses */
	uint32_t in_order; /* requests are answered in the order of the ring: a split one goes on at its used index */
};

struct queue_report { /* what Python wants to know after an event */
	uint32_t fault;      /* VQ_FAULT_*; not 0: the queue is broken */
	uint32_t head;
	uint64_t address;
	uint64_t length;
	uint32_t miss;       /* not 0: parked, waiting for the IOTLB; another number for each time */
	uint32_t miss_perm;
	uint64_t miss_iova;
	uint32_t call_error; /* an errno; not 0: nobody is at the other end of the call fd, which was closed */
	uint32_t moved;      /* not 0: a split ring began at its used index and not at the base that was given */
	uint32_t moved_base;
	uint32_t moved_used;
};

/* `event_fd` (not owned) is written when the queue breaks or misses, or lost its call fd. */
struct virtqueue *virtqueue_new(uint32_t index, int event_fd);
/* Only when nobody drives it and nothing is in flight. */
void virtqueue_free(struct virtqueue *vq);
/* Python, while stopped. Takes references. DP_E_RING_* / DP_E_BASE name what is wrong. */
int virtqueue_configure(struct virtqueue *vq, const struct queue_setup *setup,
			struct memory_table *table, struct iotlb *tlb);
/* Driver thread: swap the memory table between two chains; a ring that fell out of it breaks the queue. */
void virtqueue_set_memory(struct virtqueue *vq, struct memory_table *table);
/* 0: it may ring a queue; DP_E_NOT_EVENTFD or -errno. */
int eventfd_check(int fd);
/* Python, while nobody drives it: likewise, but the ring is looked for when the queue runs again. */
void virtqueue_set_memory_at_rest(struct virtqueue *vq, struct memory_table *table);
/* Take ownership of an eventfd (DP_E_NOT_EVENTFD: anything else, ownership stays with the caller); -1: none. */
int virtqueue_set_doorbell(struct virtqueue *vq, uint32_t kind, int fd);
/*
 * The same for an eventfd, a pipe's write end or a Unix socket (DP_E_NOT_NOTIFIER: anything else; a call fd that would
 * hold its signaller: DP_E_KEPT_FULL).
 */
int virtqueue_set_call(struct virtqueue *vq, int fd);
int virtqueue_set_err(struct virtqueue *vq, int fd);
/* The eventfd of that kind (DOORBELL_*), or -1; owned by the queue. */
int virtqueue_doorbell_fd(struct virtqueue *vq, uint32_t kind);
/* Python, while stopped: takes a reference; NULL: none. */
void virtqueue_set_interrupt_status(struct virtqueue *vq, struct interrupt_status *status);
/* The ring's position in vhost-user's encoding; 0 when it was never configured. */
uint32_t virtqueue_base(struct virtqueue *vq);
const struct queue_stats *virtqueue_stats(struct virtqueue *vq);
/* Any thread. */
void virtqueue_report(struct virtqueue *vq, struct queue_report *report);
/* Driver thread: forget a miss, so that the next pop asks again. */
void virtqueue_resume(struct virtqueue *vq);
void virtqueue_forget(struct virtqueue *vq);
