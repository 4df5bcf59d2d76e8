/* The native block device (section 5.2): device.c reads requests, io.c does the I/O. Opening images is Python's. */
#ifndef HYPERBELL_BLK_H
#define HYPERBELL_BLK_H

#include "worker/worker.h"

#include <pthread.h>

#define SECTOR_SHIFT 9

/* 5.2.6: status byte. */
#define VIRTIO_BLK_S_OK 0
#define VIRTIO_BLK_S_IOERR 1
#define VIRTIO_BLK_S_UNSUPP 2

#define VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP 1u

struct blk_lane { /* what a worker keeps of an image: blk/flush.c; its thread only, but for `next` */
	struct blk_lane *next;
	struct worker *worker;
	int fd;                      /* to sync by */
	struct request *syncing;     /* those whose sync is in flight, linked by `with`; the first one carries it */
	struct request *waiting, **waiting_tail;
};

struct blk_device {
	struct native_device native; /* first */
	struct blk_setup setup;      /* immutable; its fd is ours, and may be given another file: blk_reopened */
	uint64_t capacity;           /* atomic, sectors: changes when the image is resized */
	uint32_t writeback;          /* atomic: the driver's choice of cache mode */
	uint32_t discards, zeroes;   /* atomic: the driver accepted these requests */
	uint32_t legacy;             /* atomic: the driver did not accept VIRTIO_F_VERSION_1 */
	uint32_t no_nowait;          /* atomic: this file knows no RWF_NOWAIT; any I/O of it may block */
	uint32_t no_zero_range;      /* atomic: ... FALLOC_FL_ZERO_RANGE */
	uint8_t *memory;             /* BLK_BACKEND_MEMORY */
	bool shares_blocks;          /* fixed: direct I/O on blocks of the host's that hold several of the guest's */
	struct { pthread_mutex_t mutex; struct blk_range *oldest, *newest; } ranges;
	struct blk_errors errors;    /* atomic */
	struct {                     /* blk/kept.c: the requests of a stopped disk */
		pthread_mutex_t mutex;
		struct request *first, **last;
		uint32_t trying;     /* handed over to be tried again, and not ended yet */
	} kept;
	uint32_t news;               /* atomic: Python was woken for an error and has not looked yet */
	struct blk_lane *lanes;      /* atomic, grows at its head */
	uint32_t lane_count;         /* atomic */
	int *sync_fds;               /* before the first queue is attached, then fixed; ours */
	uint32_t sync_fd_count;
};

/* What a request's bounce buffer is used for: data alone, a block around a part of it, and that block's way back. */
enum { BLK_STAGE_MOVE, BLK_STAGE_AROUND, BLK_STAGE_BACK, BLK_STAGE_CACHED };

/* One request as read from its chain: the data pieces without header and status. */
struct blk_request {
	uint32_t type;
	uint32_t op;
	uint64_t sector;
	uint8_t *status_hva;
	struct iovec *data;
	uint32_t data_count;
	uint64_t data_len;
	uint64_t done;            /* of a transfer that failed at once: what was done of it, and is off `data` */
	uint32_t segment_count;
	struct blk_segment segments[BLK_DISCARD_SEGMENTS];
};

#define BLK_PART WORKER_TURN_BYTES      /* transferred at once */
#define BLK_PART_DIRECT (4u << 20)      /* ... by the disk's own DMA */
#define BLK_PENDING -1 /* blk_io went asynchronous: the request it started will finish */

/*
 * Do the I/O of a checked request, at once where that cannot block: a VIRTIO_BLK_S_* status, or BLK_PENDING.
 */
int blk_io(struct blk_device *blk, struct worker *w, struct virtqueue *vq, const struct chain_view *chain,
	   struct blk_request *q, uint64_t start_ns);
void blk_io_done(struct request *r, int result);
/* Begin the I/O of a request whose pieces or segments are set. */
void blk_begin(struct request *r);
/* r, which was kept or has waited for a range, may go on. */
void blk_resumed(struct request *r);

/* ---- blk/now.c ---- */

#define BLK_AGAIN -2   /* it failed, and is to be done through the reactor, where it can be kept */

/* Has the file no I/O that returns where it would have to wait? This looks at it without waiting itself. */
int blk_file_may_block(int fd);
/* Read or write as much as `flags` lets us: bytes done. *error is the errno that stopped it, or BLK_FILE_ENDED. */
uint64_t blk_transfer_now(int fd, struct blk_request *q, int flags, int *error);
/* A request on a file whose I/O never waits, at once: a VIRTIO_BLK_S_*, or BLK_AGAIN. */
int blk_file_now(struct blk_device *blk, struct blk_request *q);

/* ---- blk/end.c ---- */

/* Hand r's I/O to the reactor / end the request with this VIRTIO_BLK_S_* / with an error of the storage's. */
void blk_submit(struct request *r);
/* ... but no more of it at once than a turn may have; `first`: nothing of it was submitted yet. */
void blk_submit_part(struct request *r, bool first);
void blk_finish(struct request *r, int status);
/* What r holds beside its place in the pool. */
void blk_let_go(struct request *r);
/* End r, which had no memory to begin with. */
void blk_no_memory(struct request *r);
/* The I/O that r has last submitted failed: keep r, or end it. `error`: an errno, or BLK_FILE_ENDED. */
void blk_fail(struct request *r, int error);

/* ---- blk/direct.c, blk/ranges.c ---- */

/* Begin a read or write whose pieces are set, of a device with direct I/O. */
void blk_direct_begin(struct request *r);
/* `done` bytes, at least one, of a request with a bounce buffer. */
void blk_bounce_done(struct request *r, uint64_t done);
/* Claim these bytes of the image for r; false: blk_range_granted is called later. */
bool blk_range_claim(struct blk_device *blk, struct request *r, uint64_t first, uint64_t end);
void blk_range_release(struct blk_device *blk, struct request *r);
void blk_range_granted(struct request *r);
/* On the worker of `vq`, none of whose requests begins any more: take back its claims that wait; their requests, linked. */
struct request *blk_range_withdraw(struct blk_device *blk, const struct virtqueue *vq);

/* ---- blk/segments.c ---- */

/* A discard or write-zeroes as a whole, at once: a VIRTIO_BLK_S_*. */
int blk_segments_now(struct blk_device *blk, const struct blk_request *q);
/* Start the next segment of one, or the sync that makes it durable, or finish. */
void blk_segment_next(struct request *r);
void blk_segment_done(struct request *r, int result);
/* The range of r's segment is r's now. */
void blk_segment_begin(struct request *r);

/* ---- blk/flush.c ---- */

/* Sync the image for `r`, alone or together with others; ends the request. */
void blk_sync(struct blk_device *blk, struct request *r);
/* The sync that the reactor carried out for `r` ended. */
void blk_sync_ended(struct blk_device *blk, struct request *r, int result);
void blk_flush_free(struct blk_device *blk);

/* ---- blk/errors.c ---- */

/* Python has something to look at. */
void blk_raise_news(struct blk_device *blk);

void blk_count_error(struct blk_device *blk, uint32_t op, int error);
/* A sync failed: from now on every flush does. */
void blk_count_sync_error(struct blk_device *blk, uint32_t op, int error);

/* ---- blk/kept.c: on_error = "stop" ---- */

enum { BLK_KEPT_FAILED = 1, BLK_KEPT_WAITING };

/* r's I/O failed: true if r is kept, to be submitted again. */
bool blk_keep(struct request *r, int error);
/* r has not begun: true if the disk is stopped, and r is kept until it continues. */
bool blk_waits(struct request *r);
/* r, which was tried again, ends. */
void blk_tried(struct request *r);
/* Keep these, linked by `next`, which wait for others. */
void blk_keep_waiting(struct blk_device *blk, struct request *list);
/* The kept requests of `vq`, taken off the list, if they are all that is in flight of it; else NULL. */
struct request *blk_take_kept(struct blk_device *blk, const struct virtqueue *vq);
/* blk/drain.c */
void blk_drain(struct native_device *device, struct virtqueue *vq);

/* ---- blk/request_pieces.c ---- */

/* The request's own copy of its pieces, in io_iov; false: no memory. */
bool blk_keep_pieces(struct request *r, const struct blk_request *q);
/* Likewise its segments. */
void blk_keep_segments(struct request *r, const struct blk_request *q);
/* Of a transfer through the reactor: leave a part of what is left in io_iov / put back the rest behind it. */
void blk_part_trim(struct request *r);
void blk_part_restore(struct request *r);

/* ---- blk/parts.c ---- */

/* Is the request too long to be done at once, within one turn of its queue? */
bool blk_is_long(const struct blk_request *q);
/* Do it part by part, in its queue's next turns: BLK_PENDING, or a status. */
int blk_parts_begin(struct blk_device *blk, struct worker *w, struct virtqueue *vq, const struct chain_view *chain,
		    struct blk_request *q, uint64_t start_ns);
bool blk_proceed(struct request *r);

/* Read or write / zero on the memory back end; cannot fail. */
void blk_memory_copy(struct blk_device *blk, struct blk_request *q);
void blk_memory_zero(struct blk_device *blk, const struct blk_request *q);

static inline bool blk_transfers(uint32_t op)
{
	return op == BLK_OP_READ || op == BLK_OP_WRITE;
}

/* The bytes of the image that a request is about. */
static inline uint64_t blk_bytes(const struct blk_request *q)
{
	uint64_t sum = 0;

	if (blk_transfers(q->op))
		return q->data_len;
	for (uint32_t i = 0; i < q->segment_count; i++)
		sum += (uint64_t)q->segments[i].sectors << SECTOR_SHIFT;
	return sum;
}

/* Has a write-back of this image failed, so that no flush may succeed? */
static inline bool blk_sync_failed(const struct blk_device *blk)
{
	return load_relaxed(&blk->errors.sync_error);
}

/* True when the driver has the writes durable before they are answered. */
static inline bool blk_writethrough(const struct blk_device *blk)
{
	return !load_relaxed(&blk->writeback);
}

/* Not a write and a sync: one I/O, with FUA where there is FUA. */
static inline int blk_write_flags(const struct blk_device *blk)
{
	return blk_writethrough(blk) ? RWF_DSYNC : 0;
}

/* Skip `n` bytes of the pieces. */
static inline void iov_skip(struct iovec **iov, uint32_t *count, uint64_t n)
{
	while (n && *count) {
		if (n < (*iov)->iov_len) {
			(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
			(*iov)->iov_len -= n;
			return;
		}
		n -= (*iov)->iov_len;
		(*iov)++;
		(*count)--;
	}
}

#endif
