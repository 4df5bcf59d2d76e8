/* Memory that is given out once and never back, and what gcc calls when it copies. */
#ifndef TOY_MEMORY_H
#define TOY_MEMORY_H

#include <stddef.h>

/* Zeroed. ``alignment`` is a power of two. Ends the program when there is no more. */
void *memory_take(size_t size, size_t alignment);

void *memset(void *target, int value, size_t size);
void *memcpy(void *target, const void *source, size_t size);

#endif
