/* What the fuzz targets share: an input that is eaten from the front, and checks that end the process. */
#ifndef FUZZ_H
#define FUZZ_H

#include "ring/virtqueue.h"

#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                                                                    \
	do {                                                                                                           \
		if (!(what)) {                                                                                         \
			fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #what);                      \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

struct input {
	const uint8_t *at;
	size_t left;
};

/* The next `size` (up to 8) bytes, little endian; zeroes after the end. */
static inline uint64_t input_take(struct input *in, size_t size)
{
	uint64_t value = 0;

	for (size_t i = 0; i < size && in->left; i++, in->left--)
		value |= (uint64_t)*in->at++ << 8 * i;
	return value;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
