/* What the tests put on the data plane: workers and disks to command, and a driver that checks every byte. */
#ifndef NATIVE_LOAD_H
#define NATIVE_LOAD_H

#include "guest.h"

/* ---- workers ---- */

struct rig { /* one worker; commands come from one thread */
	struct worker *worker;
	int done_fd;
};

void rig_open(struct rig *rig, uint32_t reactor, uint32_t poll_us);
void rig_close(struct rig *rig);
/* Wait for the one command that was posted; its result. */
int rig_wait(struct rig *rig, struct worker_command *command);
/* Post a command and wait for its result. */
int rig_command(struct rig *rig, uint32_t op, struct virtqueue *vq, struct native_device *device,
		struct memory_table *table, int fd);

/* ---- disks ---- */

enum disk_kind { DISK_NULL, DISK_MEMORY, DISK_TMPFS, DISK_TMPFS_ASYNC, DISK_FILE, DISK_BOUNCE, DISK_DIRECT, DISK_KINDS };

extern const char *const disk_names[DISK_KINDS];

/* Each buffer of each queue has its own stretch of the disk, so that what it reads is what it last wrote. */
#define LOAD_QUEUES 2
#define TAG_BYTES (32u << 10)
#define TAG_SECTORS (TAG_BYTES >> 9)
#define DISK_BYTES ((uint64_t)LOAD_QUEUES * DRIVER_TAGS * TAG_BYTES)
#define DISK_SERIAL "twenty bytes of name"

/* *fd gets the image's descriptor (the caller closes it) or -1. */
struct native_device *disk_new(enum disk_kind kind, int *fd);

/* ---- the driver's thread ---- */

/* Guest memory of one queue: the rings, then for each tag its header, segments, data and status. */
#define TAG_AREA (TAG_BYTES + 0x2000u)
#define QUEUE_AREA (DRIVER_AREA + DRIVER_TAGS * TAG_AREA)
#define GUEST_BYTES ((uint64_t)LOAD_QUEUES * QUEUE_AREA)

struct load {
	struct driver driver;
	uint64_t data_gpa;
	uint32_t queue;
	bool verify;       /* the disk keeps what is written */
	bool polls;        /* never sleeps, ignores interrupts */
	bool reads_only;   /* and always through an indirect table */
	int kick_fd;
	int wait_fd;       /* epoll of every call fd the queue ever had */
	int call_fds[512]; /* all of them; the control thread's */
	uint32_t call_fd_count;
	uint64_t random;
	uint32_t in_flight;
	uint64_t submitted;
	uint64_t completed; /* atomic: other threads wait for progress */
	int stop, finished; /* atomic */
	struct expectation {
		uint32_t type, length, written;
		uint32_t offset; /* in the tag's stretch */
		uint8_t status;
		uint8_t *status_at;
	} expect[DRIVER_TAGS];
	uint8_t *shadow;    /* DRIVER_TAGS stretches */
};

void load_open(struct load *l, struct guest *g, uint32_t queue, bool packed, bool event_idx, enum disk_kind kind);
void load_close(struct load *l);
/* Give the queue its kick and its first call fd. */
void load_connect(struct load *l, struct virtqueue *vq);
/* Another call fd: waited for from now on; the caller gives the returned duplicate away. Control thread. */
int load_call_fd(struct load *l);
/* Until so many requests were made (or load.stop), and all have come back. */
void load_run(struct load *l, uint64_t requests);
/* One request of buffer `tag`; take back what is used, true: there was something. What load_run is made of. */
void load_submit(struct load *l, uint32_t tag);
bool load_collect(struct load *l);
/* pthread: load_run until load_stop; then it sets load.finished. */
void *load_thread(void *load);
/* Yield until `more` further requests are complete. */
void load_wait_progress(struct load *l, uint64_t more);
void load_stop(struct load *l);

#endif
