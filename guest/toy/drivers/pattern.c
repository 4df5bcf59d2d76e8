/* The bytes of every sector, from its number and the seed. */
#include "drivers/pattern.h"

#define SECTOR_WORDS (SECTOR_BYTES / 8)
#define STEP 0x9e3779b97f4a7c15ull

static uint64_t mix64(uint64_t value)
{
	value ^= value >> 30;
	value *= 0xbf58476d1ce4e5b9ull;
	value ^= value >> 27;
	value *= 0x94d049bb133111ebull;
	return value ^ value >> 31;
}

void pattern_fill(uint64_t *words, uint32_t sectors, uint64_t first, uint32_t seed)
{
	uint64_t tag = (uint64_t)seed << 32;
	uint64_t mixed_tag = mix64(tag);
	uint32_t sector, i;

	for (sector = 0; sector < sectors; sector++, words += SECTOR_WORDS) {
		uint64_t value = mix64((first + sector) ^ mixed_tag) + 2 * STEP;

		words[0] = first + sector;
		words[1] = tag;
		for (i = 2; i < SECTOR_WORDS; i++, value += STEP)
			words[i] = value;
	}
}

int32_t pattern_compare(const uint64_t *words, uint32_t sectors, uint64_t first, uint32_t seed)
{
	uint64_t expected[SECTOR_WORDS];
	const uint32_t *found = (const uint32_t *)words, *wanted = (const uint32_t *)expected;
	uint32_t sector, i;

	for (sector = 0; sector < sectors; sector++, found += SECTOR_BYTES / 4) {
		pattern_fill(expected, 1, first + sector, seed);
		for (i = 0; i < SECTOR_BYTES / 4; i++) {
			if (found[i] != wanted[i])
				return (int32_t)(sector * SECTOR_BYTES + i * 4);
		}
	}
	return -1;
}
