/* The data pattern of guest/boot/pattern.py: every sector says where it belongs and who wrote it. */

#include <string.h>

#include "frontend.h"

#define SECTOR_WORDS (SECTOR_SIZE / 8)
#define STEP 0x9E3779B97F4A7C15ull /* the same as in guest/boot/pattern.py */

static uint64_t mix64(uint64_t value)
{
	value ^= value >> 30;
	value *= 0xBF58476D1CE4E5B9ull;
	value ^= value >> 27;
	value *= 0x94D049BB133111EBull;
	return value ^ value >> 31;
}

static void sector_words(uint64_t *words, uint64_t sector, uint32_t seed, uint32_t generation)
{
	uint64_t tag = (uint64_t)seed << 32 | generation;
	uint64_t base = mix64(sector ^ mix64(tag));

	words[0] = sector;
	words[1] = tag;
	for (uint64_t i = 2; i < SECTOR_WORDS; i++)
		words[i] = base + i * STEP;
}

void fe_fill(void *buffer, uint64_t offset, uint64_t length, uint32_t seed, uint32_t generation)
{
	uint64_t words[SECTOR_WORDS];

	for (uint64_t done = 0; done < length; done += SECTOR_SIZE) {
		sector_words(words, (offset + done) / SECTOR_SIZE, seed, generation);
		memcpy((uint8_t *)buffer + done, words, SECTOR_SIZE);
	}
}

int64_t fe_check(const void *buffer, uint64_t offset, uint64_t length, uint32_t seed, uint32_t generation)
{
	uint64_t words[SECTOR_WORDS];

	for (uint64_t done = 0; done < length; done += SECTOR_SIZE) {
		sector_words(words, (offset + done) / SECTOR_SIZE, seed, generation);
		if (memcmp((const uint8_t *)buffer + done, words, SECTOR_SIZE))
			return (int64_t)done;
	}
	return -1;
}
