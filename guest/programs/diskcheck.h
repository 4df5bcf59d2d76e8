/* What diskcheck's two halves share: the pattern on the disk, and how a result is said. */
#ifndef DISKCHECK_H
#define DISKCHECK_H

#include <stddef.h>
#include <stdint.h>

#define SECTOR_BYTES 512
#define BLOCK_BYTES 4096
#define BUFFER_ALIGNMENT 4096

void result_print(const char *key, const char *format, ...) __attribute__((format(printf, 2, 3)));
int result_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

void *buffer_allocate(size_t size);

/* Sectors are numbered from the start of the disk; the content depends on all three numbers. */
void pattern_fill(void *buffer, size_t length, uint64_t sector, uint32_t seed, uint32_t generation);
/* The offset of the first byte that differs, or -1. */
long pattern_compare(const void *buffer, size_t length, uint64_t sector, uint32_t seed, uint32_t generation);

struct stress {
	int fd;
	uint64_t offset;   /* bytes, a multiple of BLOCK_BYTES */
	uint64_t length;   /* bytes, a multiple of threads * BLOCK_BYTES */
	uint32_t seed;
	unsigned int threads;
	unsigned int depth;    /* requests in flight for each thread */
	unsigned int requests; /* for each thread */
};

int stress_run(const struct stress *stress);

#endif
