/*
 * The border between Python and the front-end's C: read by cffi and included by frontend.h.
 * Only plain structs, prototypes and numeric #defines may stand here (cffi takes nothing else).
 *
 * Return codes: >= 0 is success, -1 .. -4095 a negated errno, FE_E_* a broken promise of the device.
 */

#define FE_E_STALLED -6001  /* nothing came back for fe_job.stall_ns */
#define FE_E_LOST_CALL -6002 /* requests came back, but the call fd was never written */
#define FE_E_BAD_ID -6003   /* a used element names no request in flight */
#define FE_E_BAD_INDEX -6004 /* the used index ran ahead of what was made available */
#define FE_E_BAD_DATA -6005 /* data read is not what was written */

#define FE_QUEUES_MAX 64
#define FE_SEGMENTS_MAX 126
#define FE_HISTOGRAM_SHIFT 6
#define FE_HISTOGRAM_BUCKETS 2240

#define FE_RANDOM 0
#define FE_SEQUENTIAL 1

struct fe_queue; /* the driver's side of one virtqueue; used by one thread at a time */

struct fe_setup {
	uint8_t *memory;       /* this queue's part of the guest memory, fe_queue_bytes() long, page aligned */
	uint64_t gpa;          /* guest address of memory[0] */
	uint32_t queue_index;  /* only for fault reports */
	uint32_t queue_size;   /* ring entries; split: a power of two */
	uint32_t request_max;  /* bytes: the longest request, a multiple of segment */
	uint32_t segment;      /* bytes: data goes out in descriptors of this length */
	uint32_t packed;       /* VIRTIO_F_RING_PACKED was negotiated */
	uint32_t event_idx;    /* VIRTIO_F_EVENT_IDX */
	uint32_t indirect;     /* VIRTIO_F_INDIRECT_DESC: every chain is one indirect descriptor */
	int32_t kick_fd;       /* eventfds, not owned, non-blocking */
	int32_t call_fd;
};

struct fe_layout { /* offsets from fe_setup.memory, bytes */
	uint64_t desc;
	uint64_t avail; /* packed: driver event suppression */
	uint64_t used;  /* packed: device event suppression */
};

struct fe_job {
	uint64_t duration_ns;  /* submit for so long; 0: until `requests` are done */
	uint64_t requests;     /* for each queue; 0: no such limit */
	uint64_t first_block;  /* the part of the disk to use, counted in request_bytes */
	uint64_t blocks;       /* queue k of n keeps to the k-th of n equal shares */
	uint64_t choice_seed;  /* of the random order */
	uint64_t stall_ns;     /* give up when nothing comes back for so long */
	uint32_t request_bytes;
	uint32_t depth;        /* requests in flight, for each queue */
	uint32_t order;        /* FE_RANDOM or FE_SEQUENTIAL */
	uint32_t write_percent;
	uint32_t sleep;        /* 1: sleep on the call fds; 0: poll the used rings, no interrupts wanted */
	uint32_t verify;       /* 1: compare what is read with the pattern */
	uint32_t pattern_seed;
	uint32_t *generations; /* one for each block of the disk; needed to write or verify, else NULL */
};

struct fe_result { /* of one queue; requests that end after duration_ns are counted nowhere */
	uint64_t requests;
	uint64_t writes;
	uint64_t errors;       /* status byte was not VIRTIO_BLK_S_OK */
	uint64_t odd_lengths;  /* the used length was not the number of bytes written */
	uint64_t kicks;
	uint64_t kicks_suppressed;
	uint64_t interrupts;   /* wake-ups of the sleeping driver */
	uint64_t empty_interrupts; /* ... that found nothing */
	uint64_t calls;        /* sum of what the call fd counted; polling: all of them unwanted */
	uint64_t elapsed_ns;
	uint64_t latency_sum_ns;
	uint64_t latency_max_ns;
	uint64_t histogram[FE_HISTOGRAM_BUCKETS];
};

struct fe_fault { /* what is known when fe_run fails */
	uint32_t queue_index;
	uint32_t in_flight;
	uint32_t avail_idx;   /* the driver's next free place (packed: | wrap << 15) */
	uint32_t last_used;   /* where the driver looks next (packed: | wrap << 15) */
	uint32_t used_idx;    /* what the device published: used.idx; packed: flags at last_used */
	uint32_t kick_wish;   /* split: avail_event, or used.flags; packed: the device's off_wrap | flags << 16 */
	uint64_t detail;      /* BAD_ID: the id; BAD_DATA: the byte offset on the disk */
};

uint64_t fe_queue_bytes(const struct fe_setup *setup);
/* How many requests a queue of this setup can have in flight. */
uint32_t fe_queue_depth(const struct fe_setup *setup);
/* Clears the rings. NULL: out of memory. */
struct fe_queue *fe_queue_new(const struct fe_setup *setup, struct fe_layout *layout);
void fe_queue_free(struct fe_queue *q);
/* What GET_VRING_BASE must answer after all requests came back (vhost-user's encoding). */
uint32_t fe_queue_base(const struct fe_queue *q);

/* Drives the queues, all in the calling thread; results has `count` elements. Returns 0 or a code. */
int fe_run(struct fe_queue **queues, uint32_t count, const struct fe_job *job, struct fe_result *results,
	   struct fe_fault *fault);

/* The pattern of guest/boot/pattern.py: `length` bytes (a multiple of 512) that belong at byte `offset`. */
void fe_fill(void *buffer, uint64_t offset, uint64_t length, uint32_t seed, uint32_t generation);
/* -1 if the bytes are the pattern's, else the position of the first sector that differs. */
int64_t fe_check(const void *buffer, uint64_t offset, uint64_t length, uint32_t seed, uint32_t generation);
