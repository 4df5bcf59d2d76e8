/*
 * Preloaded into a process: counts the calls that make a file's bytes durable, and those that might have.
 * Read by durability_probe.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <sys/uio.h>
#include <unistd.h>

uint64_t plain_writes, dsync_writes, syncs;

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	ssize_t (*next)(int, const struct iovec *, int, off_t, int) = dlsym(RTLD_NEXT, "pwritev2");

	__atomic_add_fetch(flags & RWF_DSYNC ? &dsync_writes : &plain_writes, 1, __ATOMIC_SEQ_CST);
	return next(fd, iov, count, offset, flags);
}

int fdatasync(int fd)
{
	int (*next)(int) = dlsym(RTLD_NEXT, "fdatasync");

	__atomic_add_fetch(&syncs, 1, __ATOMIC_SEQ_CST);
	return next(fd);
}

int fsync(int fd)
{
	int (*next)(int) = dlsym(RTLD_NEXT, "fsync");

	__atomic_add_fetch(&syncs, 1, __ATOMIC_SEQ_CST);
	return next(fd);
}
