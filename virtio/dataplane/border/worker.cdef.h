/* Workers: worker/. */

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
