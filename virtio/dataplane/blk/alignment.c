/* What an image's direct I/O has to be aligned to, on this host. */
#include "blk/blk.h"

#include <fcntl.h>
#include <linux/stat.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ALIGN_MAX 65536u

/* Not from the C library, whose struct may be older than the kernel's. */
static int ask(int fd, uint32_t *memory, uint32_t *offset)
{
	struct statx about = { 0 };

	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &about) < 0)
		return -errno;
	/* 0: the file has no direct I/O by this account; trying is what settles it. */
	if (!(about.stx_mask & STATX_DIOALIGN) || !about.stx_dio_mem_align || !about.stx_dio_offset_align)
		return -ENODATA;
	*memory = about.stx_dio_mem_align;
	*offset = about.stx_dio_offset_align;
	return 0;
}

/* Reads at the image's beginning, each as small as the alignment that is tried. */
static int try_out(int fd, uint32_t *memory, uint32_t *offset)
{
	uint8_t *buffer = mmap(NULL, 2 * ALIGN_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint32_t align;
	int rc = -EINVAL;

	if (buffer == MAP_FAILED)
		return -errno;
	for (align = 512; align <= ALIGN_MAX && rc == -EINVAL; align *= 2) {
		rc = pread(fd, buffer + ALIGN_MAX - ((uintptr_t)buffer & (ALIGN_MAX - 1)), align, 0) < 0 ? -errno : 0;
		*offset = align;
	}
	if (rc == 0) {
		*memory = *offset;
		/* A buffer at 512, in the middle of a page. */
		if (*offset > 512 && pread(fd, buffer + 512, *offset, 0) >= 0)
			*memory = 512;
	}
	munmap(buffer, 2 * ALIGN_MAX);
	return rc;
}

static bool sane(uint32_t align)
{
	return align && !(align & (align - 1)) && align <= ALIGN_MAX;
}

int blk_direct_alignment(int fd, uint32_t *memory, uint32_t *offset)
{
	int rc = ask(fd, memory, offset);

	if (rc < 0)
		rc = try_out(fd, memory, offset);
	if (rc == 0 && !(sane(*memory) && sane(*offset)))
		rc = -EINVAL;
	return rc;
}
