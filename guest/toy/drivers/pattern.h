/* What every sector must hold: the pattern of guest/programs/diskcheck.c and guest/boot/pattern.py, generation 0. */
#ifndef TOY_PATTERN_H
#define TOY_PATTERN_H

#include <stdint.h>

#define SECTOR_BYTES 512

void pattern_fill(uint64_t *words, uint32_t sectors, uint64_t first, uint32_t seed);

/* The first byte that differs (as far as its 32-bit word tells), or -1. */
int32_t pattern_compare(const uint64_t *words, uint32_t sectors, uint64_t first, uint32_t seed);

#endif
