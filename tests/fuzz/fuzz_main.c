/*
 * Runs a fuzz target without libFuzzer: every file of the folders given, then the same number of pseudo-random inputs
 * each time, made from those files. usage: fuzz_x ROUNDS FOLDER...
 */
#include "fuzz.h"

#include <dirent.h>

#define INPUT_MAX 4096
#define SEEDS_MAX 512

static struct seed { uint8_t data[INPUT_MAX]; size_t size; } seeds[SEEDS_MAX];
static size_t seed_count;
static uint64_t state = 0x9e3779b97f4a7c15;

static uint32_t random_below(uint32_t limit)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 20) % limit;
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
	return strcmp((*a)->d_name, (*b)->d_name);
}

static void read_folder(const char *folder)
{
	struct dirent **names;
	int count = scandir(folder, &names, NULL, by_name); /* by name: the same order, so the same inputs, everywhere */

	CHECK(count >= 0);
	for (int i = 0; i < count; i++) {
		char path[4096];
		FILE *file;

		snprintf(path, sizeof(path), "%s/%s", folder, names[i]->d_name);
		if (names[i]->d_name[0] != '.') {
			file = fopen(path, "rb");
			CHECK(file && seed_count < SEEDS_MAX);
			seeds[seed_count].size = fread(seeds[seed_count].data, 1, INPUT_MAX, file);
			seed_count++;
			fclose(file);
		}
		free(names[i]);
	}
	free(names);
}

static size_t mutate(uint8_t *data)
{
	static const uint8_t interesting[] = { 0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 0x7f, 0x80, 0xfe, 0xff };
	const struct seed *base = &seeds[random_below((uint32_t)seed_count)];
	size_t size = base->size;
	uint32_t changes = 1 + random_below(8);

	memcpy(data, base->data, size);
	if (random_below(8) == 0) { /* the rest of it from another one */
		const struct seed *other = &seeds[random_below((uint32_t)seed_count)];
		size_t from = random_below((uint32_t)(size < other->size ? size : other->size) + 1);

		memcpy(data + from, other->data + from, other->size - from);
		size = other->size;
	}
	while (changes-- && size) {
		uint32_t at = random_below((uint32_t)size);

		switch (random_below(4)) {
		case 0:
			data[at] ^= (uint8_t)(1u << random_below(8));
			break;
		case 1:
			data[at] = interesting[random_below(sizeof(interesting))];
			break;
		case 2:
			data[at] = (uint8_t)random_below(256);
			break;
		default: /* more of what comes last: steps */
			if (size < INPUT_MAX)
				data[size++] = (uint8_t)random_below(256);
		}
	}
	return size;
}

int main(int argc, char **argv)
{
	static uint8_t data[INPUT_MAX];

	CHECK(argc > 2);
	for (int i = 2; i < argc; i++)
		read_folder(argv[i]);
	CHECK(seed_count > 0);
	for (size_t i = 0; i < seed_count; i++) {
		/* In a block of its own size, so that AddressSanitizer sees a target that reads past its input. */
		uint8_t *exact = malloc(seeds[i].size + 1);

		memcpy(exact, seeds[i].data, seeds[i].size);
		LLVMFuzzerTestOneInput(exact, seeds[i].size);
		free(exact);
	}
	for (long rounds = atol(argv[1]); rounds > 0; rounds--)
		LLVMFuzzerTestOneInput(data, mutate(data));
	printf("%zu seeds and %s inputs made from them: ok\n", seed_count, argv[1]);
	return 0;
}
