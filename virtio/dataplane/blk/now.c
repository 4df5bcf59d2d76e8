/* Files whose I/O is done at once, by the worker itself: which ones, and how. */
#include "blk/blk.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

int blk_file_inline(int fd)
{
	struct statfs fs;
	struct stat about;

	if (fstatfs(fd, &fs) < 0 || fstat(fd, &about) < 0)
		return -errno;
	/* The node of a block device lies on a devtmpfs, whose type is that of a tmpfs; its data does not. */
	if (S_ISBLK(about.st_mode))
		return 0;
	return fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC;
}

int blk_file_may_block(int fd)
{
	static uint8_t buffer[4096] __attribute__((aligned(4096)));
	struct iovec piece = { buffer, sizeof(buffer) };

	return preadv2(fd, &piece, 1, 0, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP;
}

static ssize_t transfer_once(int fd, const struct blk_request *q, off_t at, int flags)
{
	/* One piece and no flags is the usual request, and the plain calls are a tenth cheaper. */
	bool plain = q->data_count == 1 && flags == 0;
	int count = (int)(q->data_count < KERNEL_IOV_MAX ? q->data_count : KERNEL_IOV_MAX);

	if (q->op == BLK_OP_READ)
		return plain ? pread(fd, q->data[0].iov_base, q->data[0].iov_len, at)
			     : preadv2(fd, q->data, count, at, flags);
	return plain ? pwrite(fd, q->data[0].iov_base, q->data[0].iov_len, at)
		     : pwritev2(fd, q->data, count, at, flags);
}

uint64_t blk_transfer_now(int fd, struct blk_request *q, int flags, int *error)
{
	uint64_t done = 0;
	ssize_t n;

	*error = 0;
	while (done < q->data_len) {
		n = transfer_once(fd, q, (off_t)((q->sector << SECTOR_SHIFT) + done), flags);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			*error = n < 0 ? errno : BLK_FILE_ENDED;
			break;
		}
		done += (uint64_t)n;
		if (likely(done == q->data_len))
			break;
		iov_skip(&q->data, &q->data_count, (uint64_t)n);
	}
	return done;
}

static int flush_now(struct blk_device *blk)
{
	if (fdatasync(blk->setup.fd) == 0)
		return VIRTIO_BLK_S_OK;
	blk_count_sync_error(blk, BLK_OP_FLUSH, errno);
	return VIRTIO_BLK_S_IOERR;
}

int blk_file_now(struct blk_device *blk, struct blk_request *q)
{
	int error;

	switch (q->op) {
	case BLK_OP_FLUSH:
		return flush_now(blk);
	case BLK_OP_DISCARD:
	case BLK_OP_WRITE_ZEROES:
		return blk_segments_now(blk, q);
	default:
		q->done = blk_transfer_now(blk->setup.fd, q, q->op == BLK_OP_WRITE ? blk_write_flags(blk) : 0, &error);
		if (q->done == q->data_len)
			return VIRTIO_BLK_S_OK;
		if (blk->setup.stop_on_error)
			return BLK_AGAIN;
		blk_count_error(blk, q->op, error);
		return VIRTIO_BLK_S_IOERR;
	}
}
