/* The native block device: blk/. */

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
	uint32_t queues;      /* which share the requests that it may have in flight; 0 counts as 1 */
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
	uint32_t stop_on_error; /* keep what the storage fails, and try it again at blk_retry: blk/kept.c */
	int news_fd;          /* not owned: an eventfd, written when there is an error to be looked at; -1: none */
};

#define BLK_ERRNOS 136   /* one more than Linux has; what is beyond counts as the last one */
#define BLK_FILE_ENDED 0 /* in place of an errno: the file ends before the capacity */

struct blk_errors { /* what the storage answered, by request and errno; any thread may read */
	uint64_t counts[DP_QUEUE_OPS][BLK_ERRNOS];
	uint32_t sync_error;  /* an errno; not 0: a write-back failed, and so does every flush until the image is reopened */
	uint32_t reopened;    /* how often blk_reopened was called */
	uint32_t stopped;     /* 1: requests are kept, because ... */
	uint32_t stop_op, stop_error; /* ... one of this kind was answered with this error */
	uint32_t kept;        /* how many are kept, those that came since among them */
	uint32_t retries;     /* how often the failed ones were tried again */
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
/*
 * Any thread; closing what was open may block. These are new open file descriptions of the same image: the first one,
 * one without O_DIRECT where there is one (else -1), and as many to sync by as blk_use_sync_fds had. Duplicates take the
 * places of the old ones, under their numbers: requests in flight keep the file that they began with. Flushes may
 * succeed again. 0, or -errno: then an old one is still in place, and every flush fails as before.
 */
int blk_reopened(struct native_device *device, int fd, int cached_fd, const int *sync_fds, uint32_t count);
/* Any thread: try again what is kept of a stopped disk. Looking at blk_errors later says what came of it. */
void blk_retry(struct native_device *device);
void blk_set_writeback(struct native_device *device, uint32_t on);
/* Which requests that need a feature the driver accepted; before anybody says so, all that the setup has. */
void blk_accept(struct native_device *device, uint32_t discards, uint32_t zeroes, uint32_t legacy);
