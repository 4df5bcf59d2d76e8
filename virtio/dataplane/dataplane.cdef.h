/*
 * The border between Python and C: read by cffi and included by dataplane.h, so the two cannot drift.
 * Only plain structs, prototypes and numeric #defines may stand here (cffi takes nothing else).
 *
 * Return codes: >= 0 is success; -1 .. -4095 is a negated errno; DP_E_* (below -4095) are our own.
 * Threads: "driver thread" is the one thread that drives a virtqueue: a worker, or the trio thread.
 */

#define DP_E_SHORT_FILE -5001
#define DP_E_NOT_EVENTFD -5002
#define DP_E_NOT_NOTIFIER -5005
#define DP_E_KEPT_FULL -5006 /* a blocking eventfd that its owner keeps full */
#define DP_E_RING_ALIGN -5003
#define DP_E_RING_SIZE -5004
#define DP_E_BASE -5006

#define DP_HISTOGRAM_BUCKETS 25
#define DP_QUEUE_OPS 8

/* ---- guest memory: memory.c, sigbus.c, iotlb.c ---- */

#define DP_PERM_READ 1
#define DP_PERM_WRITE 2

struct mapping;      /* one mmap of a region's file, refcounted, guarded against SIGBUS */
struct memory_table; /* immutable list of mapped regions, refcounted */
struct iotlb;        /* I/O virtual to user virtual addresses, shared and locked */

struct memory_region {
	uint64_t gpa;
	uint64_t size;
	uint64_t uva;
	struct mapping *mapping;
};

/* The magic number (statfs(2)) of the file system that `fd` is on; it may take its time to answer. 0 or -errno. */
int file_system(int fd, uint32_t *magic);

/* Map `size` bytes of `fd` at `offset`; NULL and *error on failure (DP_E_SHORT_FILE: file ends before). */
struct mapping *mapping_new(int fd, uint64_t offset, uint64_t size, int *error);
void mapping_unref(struct mapping *m);
int mapping_dead(struct mapping *m);
void *mapping_base(struct mapping *m);

/* Takes a reference of each region's mapping. Regions must not overlap. NULL: out of memory. */
struct memory_table *memory_table_new(const struct memory_region *regions, uint32_t count);
void memory_table_unref(struct memory_table *t);

struct iotlb *iotlb_new(void);
void iotlb_unref(struct iotlb *tlb);
int iotlb_update(struct iotlb *tlb, uint64_t iova, uint64_t size, uint64_t uva, uint32_t perm);
void iotlb_invalidate(struct iotlb *tlb, uint64_t iova, uint64_t size);
void iotlb_clear(struct iotlb *tlb);

/* Install the SIGBUS handler, once a process; call it again after somebody replaced it. */
int sigbus_install(void);

/* ---- virtio-mmio's InterruptStatus: interrupt.c ---- */

#define INTERRUPT_USED_BUFFER 1
#define INTERRUPT_CONFIG_CHANGE 2

struct interrupt_status; /* one atomic word, refcounted: workers set it, a vCPU thread reads and clears it */

struct interrupt_status *interrupt_status_new(void);
void interrupt_status_unref(struct interrupt_status *status);
/* Where the word is, for the vCPU threads of another module; valid while a reference is held. */
uint32_t *interrupt_status_word(struct interrupt_status *status);
/* Any thread. */
void interrupt_status_raise(struct interrupt_status *status, uint32_t bits);
void interrupt_status_acknowledge(struct interrupt_status *status, uint32_t bits);
uint32_t interrupt_status_value(struct interrupt_status *status);

/* ---- virtqueues: virtqueue.c, split.c, packed.c, notify.c ---- */

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

/* ---- the Python pump's way to a queue: chain.c (driver thread only) ---- */

struct chain;
struct chain_info {
	uint64_t readable_len;
	uint64_t writable_len;
	uint32_t head;
};

/* Read every doorbell's eventfd, never blocking; returns the sum of their counts. */
uint64_t virtqueue_take_kicks(struct virtqueue *vq);
/*
 * Up to `max` chains into `chains`, or so many as hold a MiB; returns how many, VQ_BROKEN, or 0 (empty or parked).
 * One of more than `request_max` bytes, readable or writable, breaks the queue.
 */
int virtqueue_pop_many(struct virtqueue *vq, struct chain **chains, uint32_t max, uint32_t request_max);
void chain_info(const struct chain *c, struct chain_info *info);
int64_t chain_read(const struct chain *c, uint64_t offset, void *buffer, uint64_t length);
int64_t chain_write(struct chain *c, uint64_t offset, const void *buffer, uint64_t length);
void chain_time(struct chain *c, uint32_t op, uint32_t failed);
/* Return `count` chains with the bytes written to each; frees them; publishes and notifies once. */
void virtqueue_push_many(struct virtqueue *vq, struct chain **chains, const uint32_t *written, uint32_t count);
/* Un-pop the `count` chains popped last, oldest first in `chains`: the next pop finds them again. Frees them. */
void virtqueue_rewind(struct virtqueue *vq, struct chain **chains, uint32_t count);
/* Free a chain without returning it to the driver (the queue is being reset). */
void chain_drop(struct chain *c);
/* 1: broken, so no kick is of interest before it is set up again. */
int virtqueue_broken(struct virtqueue *vq);
/* 1: kicks are on and the ring was empty after that; 0: there is work. */
int virtqueue_arm(struct virtqueue *vq);
void virtqueue_disarm(struct virtqueue *vq);
/* Signal the call fd once, whatever the driver asked for. */
void virtqueue_signal(struct virtqueue *vq);
void virtqueue_break(struct virtqueue *vq, uint32_t fault, uint32_t head, uint64_t address, uint64_t length);

/* ---- native block device: device_blk.c, blk_io.c, blk_flush.c, blk_errors.c ---- */

#define BLK_OP_READ 0
#define BLK_OP_WRITE 1
#define BLK_OP_FLUSH 2
#define BLK_OP_DISCARD 3
#define BLK_OP_WRITE_ZEROES 4
#define BLK_OP_GET_ID 5
#define BLK_OP_OTHER 6

#define BLK_BACKEND_NULL 0
#define BLK_BACKEND_MEMORY 1
#define BLK_BACKEND_FILE 2
#define BLK_BACKEND_BLOCK_DEVICE 3

#define BLK_SEG_MAX 126
#define BLK_DISCARD_SEGMENTS 16

struct native_device;

struct blk_setup {
	uint64_t capacity;    /* in 512-byte sectors */
	int fd;               /* FILE and BLOCK_DEVICE; a duplicate is made; -1 otherwise */
	uint32_t backend;     /* BLK_BACKEND_* */
	uint32_t block_size;  /* logical block size: 512 .. 4096 */
	uint32_t direct;      /* the fd is O_DIRECT */
	uint32_t memory_align, offset_align; /* what direct I/O takes: powers of two; offset_align of lengths, too */
	uint32_t erase_align; /* what fallocate takes: a block device's own block size, else 1 */
	int cached_fd;        /* the file without O_DIRECT; a duplicate is made; -1: offset_align is at most block_size */
	uint32_t inline_io;   /* the file's I/O never blocks for long (tmpfs): plain preadv on the worker */
	uint32_t read_only;
	uint32_t discard;     /* offer DISCARD */
	uint32_t write_zeroes;
	uint32_t max_discard_sectors;
	uint32_t max_write_zeroes_sectors;
	char serial[20];
	int news_fd;          /* not owned: an eventfd, written when there is an error to be looked at; -1: none */
};

#define BLK_ERRNOS 136   /* one more than Linux has; what is beyond counts as the last one */
#define BLK_FILE_ENDED 0 /* in place of an errno: the file ends before the capacity */

struct blk_errors { /* what the storage answered, by request and errno; any thread may read */
	uint64_t counts[DP_QUEUE_OPS][BLK_ERRNOS];
	uint32_t sync_error;  /* an errno; not 0: a write-back failed, and so does every flush until the image is reopened */
};

/* 1: the file lies where its I/O never waits for a device (tmpfs, ramfs); 0: it may wait; or -errno. */
int blk_file_inline(int fd);
/*
 * What direct I/O on this O_DIRECT fd takes, which has to be aligned: from the kernel (statx, STATX_DIOALIGN), or, where
 * the file system does not say, by trying. 0, or -errno: no direct I/O.
 */
int blk_direct_alignment(int fd, uint32_t *memory, uint32_t *offset);
struct native_device *blk_new(const struct blk_setup *setup, int *error);
void native_device_unref(struct native_device *device);
/* Any thread, at any time. */
void blk_set_capacity(struct native_device *device, uint64_t sectors);
const struct blk_errors *blk_errors(struct native_device *device);
/* Before its errors are looked at: the next one writes news_fd again. */
void blk_await_news(struct native_device *device);
/*
 * Before the first queue is attached: further open file descriptions of the image, which the device owns from then on:
 * with one less than workers each of them syncs by its own.
 */
int blk_use_sync_fds(struct native_device *device, const int *fds, uint32_t count);
void blk_set_writeback(struct native_device *device, uint32_t on);
/* Which requests that need a feature the driver accepted; before anybody says so, all that the setup has. */
void blk_accept(struct native_device *device, uint32_t discards, uint32_t zeroes, uint32_t legacy);

/* ---- native network device: net_device.c, net_control.c, net_switch.c; net.h names the other files ---- */

#define NET_OP_RECEIVE 0  /* to the guest */
#define NET_OP_TRANSMIT 1 /* from the guest */
#define NET_OP_CONTROL 2

#define NET_BACKEND_DROP 0
#define NET_BACKEND_REFLECT 1
#define NET_BACKEND_SWITCH 2
#define NET_BACKEND_TAP 3      /* fds of one tap interface, a queue each, with a virtio header of 12 bytes */
#define NET_BACKEND_DATAGRAM 4 /* a socket with one frame a message */

#define NET_PAIRS_MAX 16
#define NET_SWITCH_PORTS_MAX 1024

struct net_switch; /* refcounted; its ports are driven by one worker */

struct net_setup {
	uint32_t backend;       /* NET_BACKEND_* */
	uint32_t pairs;
	int fds[NET_PAIRS_MAX]; /* TAP and DATAGRAM: non-blocking; duplicates are made */
	uint8_t mac[6];
	uint32_t keeps_mac;     /* SWITCH: no other port may send with that address */
};

struct net_counters { /* frames lost, by reason; one set a pair, written by its worker, relaxed; read by anyone */
	/* from the guest */
	uint64_t malformed;       /* with a header that lies, or no frame */
	uint64_t sent_link_down;
	uint64_t sent_disabled;   /* on a transmit queue that the front-end disabled */
	uint64_t dropped;         /* nobody there to take it */
	uint64_t spoofed;         /* with the address of another port of the switch, which keeps it */
	/* for the guest */
	uint64_t no_buffers;      /* which had no receive buffers */
	uint64_t refused;         /* larger than its buffers or its MTU */
	uint64_t received_link_down;
	uint64_t filtered;        /* for an address it does not want to hear */
	uint64_t misreceived;     /* no frame, or one with a header that no receiver understands */
	/* not lost */
	uint64_t flooded;         /* by a switch, to all its ports */
};

struct net_switch *net_switch_new(void);
void net_switch_unref(struct net_switch *lan);
/* `lan` for NET_BACKEND_SWITCH, else NULL; takes a reference. */
struct native_device *net_new(const struct net_setup *setup, struct net_switch *lan, int *error);
/* Any thread, at any time. Other features than before: what the driver said by its control queue is forgotten. */
void net_set_features(struct native_device *device, uint64_t features);
void net_set_link(struct native_device *device, uint32_t up);
/* 5.1.4.1: with VIRTIO_NET_F_MTU no packet is longer for the driver; 0: nobody said what it is. */
void net_set_mtu(struct native_device *device, uint32_t mtu);
/* Any thread: what is sent on that pair is taken and lost. A turn that has begun may not know yet. */
void net_mute(struct native_device *device, uint32_t pair, uint32_t on);
/* 5.1.4: ask the driver to announce itself; true until it has acknowledged that. */
void net_ask_to_announce(struct native_device *device);
uint32_t net_announcing(struct native_device *device);
/* The address that the driver goes by: its own choice, or net_setup's. */
void net_mac(struct native_device *device, uint8_t mac[6]);
void net_set_mac(struct native_device *device, const uint8_t mac[6]);
/* How many pairs frames for the guest are spread over now. */
uint32_t net_active_pairs(struct native_device *device);
/* Have WORKER_NUDGE to the worker of the first pair send a RARP request for `mac` to the other side. */
void net_prepare_rarp(struct native_device *device, const uint8_t mac[6]);
/* The sum over all pairs. */
void net_counters(struct native_device *device, struct net_counters *sum);

/* ---- workers: worker.c, worker_thread.c, reactor_uring.c, reactor_epoll.c ---- */

#define WORKER_ATTACH 1     /* drive the queue for the device; look at the ring once */
#define WORKER_DETACH 2     /* stop popping, drain, then acknowledge */
#define WORKER_SET_MEMORY 3
#define WORKER_SET_CALL 4   /* argument: the fd, or -1 */
#define WORKER_SET_ERR 5
#define WORKER_RESUME 6
#define WORKER_QUIT 7
#define WORKER_NUDGE 8      /* the device has something for its worker to do */
#define WORKER_SET_DOORBELL 9 /* arguments: a further doorbell's kind, and the fd, or -1; one at a time a queue */

#define REACTOR_AUTO 0
#define REACTOR_IO_URING 1
#define REACTOR_EPOLL 2

struct worker;

struct worker_command {
	/* given by Python, which keeps the struct alive until it is done */
	uint32_t op;
	int32_t fd;
	struct virtqueue *vq;
	struct native_device *device;
	struct memory_table *table;
	uint64_t tag;
	uint32_t doorbell;
	/* filled in by the worker */
	int32_t result;
	struct worker_command *next;
};

struct worker_stats { /* written by the worker, relaxed; read by anyone */
	uint64_t wakeups;
	uint64_t poll_hits;
	uint64_t poll_misses;
	uint32_t reactor;      /* REACTOR_*, the one in use */
	uint32_t uring_error;  /* the errno for which io_uring was wanted and could not be had; 0: none; then fixed */
};

/* `done_fd` (not owned) is written when commands are done. */
struct worker *worker_new(const char *name, uint32_t reactor, uint32_t poll_us,
			  const uint32_t *cpus, uint32_t cpu_count, int done_fd, int *error);
void worker_post(struct worker *w, struct worker_command *command);
/* The list of done commands, linked by `next`, or NULL. */
struct worker_command *worker_take_done(struct worker *w);
const struct worker_stats *worker_stats(struct worker *w);
/* CPU time the thread has used; any thread may ask. */
uint64_t worker_cpu_ns(struct worker *w);
/* After WORKER_QUIT was acknowledged: join and free. */
void worker_free(struct worker *w);
