/*
 * Workers, the native devices whose queues they drive, and the requests that wait for I/O meanwhile. worker.c says how it
 * goes round. Nothing here knows what a request means: that is the device's (blk/, net/).
 */
#ifndef HYPERBELL_WORKER_H
#define HYPERBELL_WORKER_H

#include "ring/virtqueue.h"

#include <sched.h>

/* ---- native devices and their requests ---- */

/* Data of SEG_MAX segments and some crossings of memory regions. A request of more pieces allocates its own array. */
#define REQUEST_IOV_MAX (BLK_SEG_MAX + 10)

enum io_kind { IO_READ, IO_WRITE, IO_FSYNC, IO_FALLOCATE };

struct blk_segment { /* 5.2.6: struct virtio_blk_discard_write_zeroes */
	uint64_t sector;
	uint32_t sectors;
	uint32_t flags;
};

struct blk_range { /* bytes of an image that a request may change; its device's mutex: blk/ranges.c */
	struct blk_range *previous, *next;
	uint64_t first, end;
	uint32_t before;                /* earlier ones that it overlaps */
	bool claimed;
};

struct request { /* one request that waits for I/O; from its queue's pool; worker thread */
	struct inflight link;           /* first, so that a link is a request */
	struct request *next;           /* in the free list or a reactor's done list */
	struct worker *worker;
	struct virtqueue *vq;
	struct native_device *device;
	struct memory_table *table;     /* reference: the chain keeps the table it began with */
	uint32_t head, slots;
	uint32_t op;
	uint32_t written;               /* bytes to report as written when all went well */
	uint64_t bytes;                 /* bytes to count */
	uint8_t *status_hva;
	/* the I/O under way */
	enum io_kind io;
	int fd;
	int flags;                      /* read, write: RWF_*; fallocate: its mode */
	struct iovec *io_iov;           /* what is left of it */
	uint32_t io_count;              /* may be more than KERNEL_IOV_MAX: see request_pieces */
	uint64_t offset, length;        /* in the file; what is left */
	uint32_t number;                /* of its chain, in the order in which the queue's were popped */
	bool may_block;                 /* where it is begun: the file has no non-blocking I/O */
	int result;                     /* epoll reactor: io_uring's res */
	/* the device's own */
	struct request *with;           /* further requests that the same I/O serves */
	uint8_t *bounce;                /* aligned copy of a part of the data, or NULL; blk/direct.c */
	struct iovec bounce_iov;
	struct iovec *guest_iov;        /* with a bounce buffer: the guest's pieces from that part on */
	uint32_t guest_count;
	uint32_t whole_count;           /* io_count and ... */
	uint64_t trimmed;               /* ... what the last of io_iov has beyond the part of the transfer under way */
	uint64_t at;                    /* where in the image guest_iov begins */
	uint32_t skip, piece;           /* where in the buffer, and how long the part is */
	uint32_t stage;                 /* BLK_STAGE_* */
	struct blk_range range;
	uint32_t segment, segment_count;
	bool zeroing;                   /* write-zeroes by plain writes */
	bool tried;                     /* it failed before, and is being tried again */
	uint8_t kept;                   /* BLK_KEPT_*: it waits in its device's list, or comes from there; 0: neither */
	struct iovec iov[REQUEST_IOV_MAX];
	struct iovec *many;             /* the pieces where there are more than that, or NULL */
	struct blk_segment segments[BLK_DISCARD_SEGMENTS];
};

/* How many of its pieces the next call takes: io_done hears of a part, and submits the rest. */
static inline uint32_t request_pieces(const struct request *r)
{
	return r->io_count < KERNEL_IOV_MAX ? r->io_count : KERNEL_IOV_MAX;
}

#define SERVE_ASYNC -1
#define SERVE_BROKEN -2

struct native_device {
	const struct native_ops *ops;
	int refs; /* atomic */
	uint32_t queues; /* fixed: they share DEVICE_REQUESTS; 0 counts as 1 */
};

/*
 * Something beside the queues that a device waits for (a tap, a socket); worker thread. It is edge-triggered: `ready`
 * says what came since it was last cleared, and whoever clears it goes on until EAGAIN.
 */
struct source {
	int fd;                 /* its owner's */
	uint32_t events;        /* what to watch for; fixed */
	uint32_t ready;         /* POLLIN, POLLOUT */
	bool wanted;            /* its owner wants to hear of it */
	bool watched;           /* the reactor has it; it may be wanted no more */
	struct native_device *device; /* a reference while watched */
};

void source_add(struct worker *w, struct source *source, struct native_device *device);
void source_remove(struct worker *w, struct source *source);
/* Called by a reactor: these events came / it is no longer looked at. */
void source_rang(struct source *source, uint32_t events);
void source_removed(struct worker *w, struct source *source);

/* For a device that does not simply serve chains as they come (a NIC's receive queues). Worker thread. */
struct queue_ops {
	void (*attached)(struct native_device *device, struct worker *w, struct virtqueue *vq);
	/* No turn of the queue comes any more: give back what it has in flight, or see that it is. */
	void (*detaching)(struct native_device *device, struct virtqueue *vq);
	void (*detached)(struct native_device *device, struct worker *w, struct virtqueue *vq);
	/* Is there something to do now? */
	bool (*ready)(struct native_device *device, struct virtqueue *vq);
	/* Do a bounded part of it; true: something was done. */
	bool (*turn)(struct native_device *device, struct worker *w, struct virtqueue *vq);
	/* The worker is about to sleep: ask for the kicks that are of interest. False: there is work after all. */
	bool (*arm)(struct native_device *device, struct virtqueue *vq);
	/* The worker is awake again: no kicks until it sleeps. */
	void (*disarm)(struct native_device *device, struct virtqueue *vq);
};

struct native_ops {
	const struct queue_ops *queue; /* NULL: chains are served as they come, by `serve` */
	/* Worker thread. Bytes written to the guest (>= 0) when done at once, or SERVE_*. */
	int64_t (*serve)(struct native_device *device, struct worker *w, struct virtqueue *vq,
			 struct chain_view *chain, uint64_t start_ns);
	/* Worker thread: r's I/O ended with `result` (io_uring's res). Submits the next one or finishes r. */
	void (*io_done)(struct request *r, int result);
	/* Worker thread: do the next part of virtqueue.unfinished; true: that was the last one, and r is finished. */
	bool (*proceed)(struct request *r);
	/* Worker thread: r, which waited for something of the device's, may go on. */
	void (*resumed)(struct request *r);
	/* Worker thread, while the queue stops, may be NULL: give back what has no I/O in flight and would wait. */
	void (*drain)(struct native_device *device, struct virtqueue *vq);
	/* Worker thread: WORKER_NUDGE came. NULL: it means nothing to this device. */
	void (*nudged)(struct native_device *device, struct worker *w);
	void (*free)(struct native_device *device);
};

struct native_device *native_device_ref(struct native_device *device);

/* ---- worker ---- */

/*
 * Requests of a device that may wait for I/O at once, an equal share for each of its queues. A queue whose share is in
 * use waits, and it alone: a disk that hangs holds its own requests and threads, and no other disk's.
 */
#define DEVICE_REQUESTS 1024
#define QUEUE_REQUESTS 256     /* the largest share */
#define QUEUE_REQUESTS_MIN 4   /* the smallest one */
/*
 * A queue's turn, after which the next queue has its own: so many chains, so long, or so many bytes copied. A chain of
 * more bytes than that is done in parts, one a turn; whoever shares the worker waits for a part, not for the chain.
 */
#define WORKER_TURN 64
#define WORKER_TURN_NS 200000
#define WORKER_TURN_BYTES (1u << 20)
/*
 * Requests that a round hands over to storage, and at least one of each queue that has any: the kernel takes 5 to 10 us
 * for each, and a greedy disk may have hundreds.
 */
#define WORKER_ROUND_STARTS 32
/*
 * One published index and one notification end a batch: a turn, or so much of a longer one. A driver that sleeps takes
 * some 30 us to wake up, and may do so while the rest is being served.
 */
#define WORKER_BATCH_NS 15000

struct reactor_ops {
	int (*open)(struct worker *w);
	void (*close)(struct worker *w);
	/* Watch a doorbell / stop: worker_doorbell_removed is called, now or later, when it is no longer looked at. */
	int (*add_doorbell)(struct worker *w, struct virtqueue *vq, uint32_t kind);
	void (*remove_doorbell)(struct worker *w, struct virtqueue *vq, uint32_t kind);
	/* The same for a source, with source_removed. */
	int (*add_source)(struct worker *w, struct source *source);
	void (*remove_source)(struct worker *w, struct source *source);
	/* Start r's I/O, which ends in native_ops.io_done from a later turn. */
	void (*submit)(struct worker *w, struct request *r);
	/* Hand over what is gathered and take what is done; true: something was. timeout_ns: 0 don't wait. */
	bool (*turn)(struct worker *w, uint64_t timeout_ns);
};

extern const struct reactor_ops uring_ops, epoll_ops;

#define WAIT_FOREVER UINT64_MAX

struct worker {
	/* fixed */
	const struct reactor_ops *reactor;
	struct reactor_state *state;
	int wake_fd, done_fd;
	uint64_t poll_max_ns;
	uint64_t turn_ns;               /* WORKER_TURN_NS; tests have others */
	uint64_t thread;                /* pthread_t */
	uint32_t reactor_wanted;
	cpu_set_t *cpus;                /* where its thread may run; NULL: anywhere */
	size_t cpus_size;
	char name[16];
	/* any thread */
	struct worker_command *inbox;   /* atomic stack: Python pushes, the worker takes it whole */
	struct worker_command *done;    /* atomic stack: the worker pushes, Python takes it whole */
	struct request *handed;         /* atomic stack: requests of this worker that may go on */
	int sleeping;                   /* atomic: whoever posts a command must write wake_fd */
	struct worker_stats stats;
	/* worker thread */
	struct virtqueue *queues;
	struct virtqueue *touched[64];  /* queues with unpublished elements; beyond it they are published at once */
	uint32_t touched_count;
	struct request *parts, **parts_tail; /* what worker_submit_part was given, in order */
	uint64_t moved;                 /* bytes copied in this turn, as far as its queue counts them; the reactor's turn likewise */
	uint32_t started;               /* requests handed over in this round: WORKER_ROUND_STARTS */
	uint64_t poll_ns;               /* the adaptive window */
	uint64_t clock_ns;              /* the clock, when it was looked at last */
	bool clock_read;                /* in this round */
	uint64_t looking_ns, looked_ns; /* when this round began to look at the queues, and when the round before did */
	uint32_t kickless;              /* queues without a kick fd: they are polled, with short sleeps */
	struct worker_command *quit;
	struct iovec scratch[CHAIN_IOV_MAX];
};

/* Worker thread: what the clock has just said, so that the next round need not look at it. */
static inline void worker_clock(struct worker *w, uint64_t now)
{
	w->clock_ns = now;
	w->clock_read = true;
}

/* Worker thread: a round looks at every queue: what is found now and was not at the last look came since then (ring/guest_wait.c). */
static inline void worker_looks(struct worker *w)
{
	w->looked_ns = w->looking_ns;
	if (!w->clock_read) /* nothing else has looked at it since, and what it said may be long ago */
		w->clock_ns = now_ns();
	w->clock_read = false;
	w->looking_ns = w->clock_ns;
}

/* Any thread: r may go on, on its own worker, which lives until then. */
void request_hand_over(struct request *r);
/* Worker thread: resume what was handed over. */
bool worker_take_handed(struct worker *w);
/* An atomic stack. Any thread: push r, and wake its worker / the worker: all of them, pushed first, first; or NULL. */
void requests_push(struct request **stack, struct request *r);
struct request *requests_take(struct request **stack);
/* worker/worker.c: rounds, until WORKER_QUIT came; one of them, without waiting: true when anything happened. */
void worker_run(struct worker *w);
bool worker_round(struct worker *w);
/* worker/io_threads.c: threads for I/O that blocks, a few a device. Worker thread, but for io_perform. */
struct io_threads *io_threads_new(struct worker *w);
void io_threads_submit(struct io_threads *threads, struct request *r);
/* Requests whose I/O is over, linked by `next`, or NULL; it is looked for again whenever the worker is about to sleep. */
struct request *io_threads_done(struct io_threads *threads);
/* Only once nothing is in flight. */
void io_threads_free(struct io_threads *threads);
/* r's I/O, here and now: io_uring's res. */
int io_perform(const struct request *r);
/* worker/mailbox.c: the worker's side of its commands. */
struct worker_command *worker_take_inbox(struct worker *w);
void worker_acknowledge(struct worker *w, struct worker_command *command, int result);
/* Any thread, after it has pushed something for a worker that may sleep. */
void worker_wake(struct worker *w);
/* Elements were pushed to `vq`: publish and notify it at the end of this round. */
void worker_touch(struct worker *w, struct virtqueue *vq);
/* Show the drivers what was pushed to the queues touched since the last time. */
void worker_publish_touched(struct worker *w);
/* Submit the next part of a long transfer: in its turn, for the kernel may copy it while it takes it. */
void worker_submit_part(struct worker *w, struct request *r);
/* The requests of a queue, for as long as a worker has it; -ENOMEM. */
int requests_make(struct virtqueue *vq, const struct native_device *device);
void requests_drop(struct virtqueue *vq);
static inline bool requests_left(const struct virtqueue *vq)
{
	return vq->free_requests || vq->pool_used < vq->pool_size;
}

/* A request for a popped chain, with the chain's heads and table; NULL when no request is left. */
struct request *request_start(struct worker *w, struct virtqueue *vq, struct native_device *device,
			      const struct chain_view *chain, uint64_t start_ns);
/* Push, count and recycle. */
void request_finish(struct request *r, uint32_t written, bool failed);
/* Recycle a request whose chain the caller gives back to the ring. */
void request_withdraw(struct request *r);
/* Called by a reactor: a doorbell of `vq` rang / the eventfd of that kind is no longer watched. */
void worker_kicked(struct virtqueue *vq);
void worker_doorbell_removed(struct worker *w, struct virtqueue *vq, uint32_t kind);
/* Is a doorbell of that kind to be watched no more? */
bool worker_doorbell_leaves(const struct virtqueue *vq, uint32_t kind);

/* worker/doorbell.c: the eventfds of a queue in the poll set, all at once, and one changed while the queue is at work. */
int worker_add_doorbells(struct worker *w, struct virtqueue *vq);
void worker_remove_doorbells(struct worker *w, struct virtqueue *vq);
void worker_change_doorbell(struct worker *w, struct virtqueue *vq, struct worker_command *command);

#endif
