/* The pool that memory is given out from, and what gcc calls when it copies. */
#include "start/memory.h"

#include <stdint.h>

#include "start/report.h"

#define POOL_SIZE (512 * 1024)

static uint8_t pool[POOL_SIZE] __attribute__((aligned(4096)));
static size_t taken;

void *memory_take(size_t size, size_t alignment)
{
	size_t begin = (taken + alignment - 1) & ~(alignment - 1);

	if (begin > POOL_SIZE || size > POOL_SIZE - begin) {
		report_error("memory: no %u bytes left for another device", (uint32_t)size);
		report_exit();
	}
	taken = begin + size;
	return &pool[begin];
}

/* One instruction for the whole block, and not a loop that gcc would turn into a call of itself. */
void *memset(void *target, int value, size_t size)
{
	void *at = target;

	asm volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(value) : "memory");
	return target;
}

void *memcpy(void *target, const void *source, size_t size)
{
	void *at = target;

	asm volatile("rep movsb" : "+D"(at), "+S"(source), "+c"(size) : : "memory");
	return target;
}
