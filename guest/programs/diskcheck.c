/*
 * diskcheck LABEL COMMAND ARGUMENTS: what a guest's shell cannot do to a disk.
 *
 * Every answer is a line "RESULT LABEL.key=value" for the host to read; the exit status is 0 when the
 * command did and found what it should. All I/O is O_DIRECT, so that it reaches the device.
 */
#define _GNU_SOURCE
#include "diskcheck.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define CHUNK_SIZE (1024 * 1024)
#define RANDOM_MAX 65536

static const char *label;

static void result_vprint(const char *key, const char *format, va_list arguments)
{
	char value[512];

	vsnprintf(value, sizeof(value), format, arguments);
	/* One write, so that lines of several threads never mix. */
	printf("RESULT %s.%s=%s\n", label, key, value);
	fflush(stdout);
}

void result_print(const char *key, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	result_vprint(key, format, arguments);
	va_end(arguments);
}

int result_error(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	result_vprint("error", format, arguments);
	va_end(arguments);
	return 1;
}

void *buffer_allocate(size_t size)
{
	void *buffer = NULL;

	if (posix_memalign(&buffer, BUFFER_ALIGNMENT, size)) {
		result_error("no memory for %zu bytes", size);
		exit(1);
	}
	memset(buffer, 0, size);
	return buffer;
}

static uint64_t mix64(uint64_t value)
{
	value ^= value >> 30;
	value *= 0xbf58476d1ce4e5b9ULL;
	value ^= value >> 27;
	value *= 0x94d049bb133111ebULL;
	return value ^ (value >> 31);
}

/*
 * A sector's 64 little-endian words: its number; seed and generation; then base + i * odd constant.
 * guest/boot/pattern.py computes the same on the host.
 */
static void pattern_sector(uint64_t words[SECTOR_BYTES / 8], uint64_t sector, uint32_t seed, uint32_t generation)
{
	uint64_t tag = (uint64_t)seed << 32 | generation;
	uint64_t base = mix64(sector ^ mix64(tag));
	unsigned int i;

	words[0] = sector;
	words[1] = tag;
	for (i = 2; i < SECTOR_BYTES / 8; i++)
		words[i] = base + i * 0x9e3779b97f4a7c15ULL;
}

void pattern_fill(void *buffer, size_t length, uint64_t sector, uint32_t seed, uint32_t generation)
{
	size_t done;

	for (done = 0; done < length; done += SECTOR_BYTES)
		pattern_sector((uint64_t *)((char *)buffer + done), sector++, seed, generation);
}

long pattern_compare(const void *buffer, size_t length, uint64_t sector, uint32_t seed, uint32_t generation)
{
	uint64_t words[SECTOR_BYTES / 8];
	const char *found = buffer;
	size_t done, i;

	for (done = 0; done < length; done += SECTOR_BYTES) {
		pattern_sector(words, sector++, seed, generation);
		if (!memcmp(found + done, words, SECTOR_BYTES))
			continue;
		for (i = 0; found[done + i] == ((char *)words)[i]; i++)
			;
		return (long)(done + i);
	}
	return -1;
}

static uint64_t number(const char *text)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || end == text || *end) {
		result_error("'%s' is not a number", text);
		exit(2);
	}
	return value;
}

static int disk_open(const char *path, int flags)
{
	int fd = open(path, flags | O_DIRECT | O_CLOEXEC);

	if (fd < 0) {
		result_error("open %s: %s", path, strerror(errno));
		exit(1);
	}
	return fd;
}

static int command_info(const char *path)
{
	int fd = disk_open(path, O_RDONLY), logical = 0, read_only = 0;
	unsigned int physical = 0, io_min = 0, io_opt = 0;
	uint64_t size = 0;

	if (ioctl(fd, BLKGETSIZE64, &size) || ioctl(fd, BLKSSZGET, &logical) || ioctl(fd, BLKPBSZGET, &physical) ||
	    ioctl(fd, BLKIOMIN, &io_min) || ioctl(fd, BLKIOOPT, &io_opt) || ioctl(fd, BLKROGET, &read_only))
		return result_error("asking %s: %s", path, strerror(errno));
	result_print("size", "%llu", (unsigned long long)size);
	result_print("logical_block", "%d", logical);
	result_print("physical_block", "%u", physical);
	result_print("io_min", "%u", io_min);
	result_print("io_opt", "%u", io_opt);
	result_print("read_only", "%d", read_only);
	return 0;
}

static int command_write(const char *path, uint64_t offset, uint64_t length, uint32_t seed)
{
	int fd = disk_open(path, O_WRONLY);
	char *buffer = buffer_allocate(CHUNK_SIZE);
	uint64_t done;

	for (done = 0; done < length;) {
		size_t size = length - done < CHUNK_SIZE ? length - done : CHUNK_SIZE;
		ssize_t written;

		pattern_fill(buffer, size, (offset + done) / SECTOR_BYTES, seed, 0);
		written = pwrite(fd, buffer, size, (off_t)(offset + done));
		if (written != (ssize_t)size)
			return result_error("write of %zu bytes at %llu: %s", size, (unsigned long long)(offset + done),
					    written < 0 ? strerror(errno) : "short");
		done += size;
	}
	result_print("bytes", "%llu", (unsigned long long)done);
	return 0;
}

/* Compare with the pattern of seed, or with zeroes when there is no seed. */
static int command_verify(const char *path, uint64_t offset, uint64_t length, const uint32_t *seed)
{
	int fd = disk_open(path, O_RDONLY);
	char *buffer = buffer_allocate(CHUNK_SIZE), *zeroes = buffer_allocate(CHUNK_SIZE);
	uint64_t done;

	for (done = 0; done < length;) {
		size_t size = length - done < CHUNK_SIZE ? length - done : CHUNK_SIZE;
		ssize_t got = pread(fd, buffer, size, (off_t)(offset + done));
		long differs = -1;

		if (got != (ssize_t)size)
			return result_error("read of %zu bytes at %llu: %s", size, (unsigned long long)(offset + done),
					    got < 0 ? strerror(errno) : "short");
		if (seed)
			differs = pattern_compare(buffer, size, (offset + done) / SECTOR_BYTES, *seed, 0);
		else if (memcmp(buffer, zeroes, size))
			for (differs = 0; !buffer[differs]; differs++)
				;
		if (differs >= 0)
			return result_error("byte %llu is 0x%02x and not what was written",
					    (unsigned long long)(offset + done + (uint64_t)differs), buffer[differs] & 0xff);
		done += size;
	}
	result_print("bytes", "%llu", (unsigned long long)done);
	return 0;
}

static int command_range(const char *path, unsigned long request, uint64_t offset, uint64_t length)
{
	int fd = disk_open(path, O_WRONLY);
	uint64_t range[2] = {offset, length};

	if (ioctl(fd, request, range))
		return result_error("%s of %llu bytes at %llu: %s", request == BLKDISCARD ? "BLKDISCARD" : "BLKZEROOUT",
				    (unsigned long long)length, (unsigned long long)offset, strerror(errno));
	result_print("bytes", "%llu", (unsigned long long)length);
	return 0;
}

static int command_flush(const char *path)
{
	int fd = disk_open(path, O_WRONLY);

	if (fsync(fd))
		return result_error("fsync: %s", strerror(errno));
	result_print("flushed", "1");
	return 0;
}

static int command_random(const char *path, uint64_t count)
{
	static unsigned char bytes[RANDOM_MAX];
	char hexadecimal[65] = "";
	unsigned int seen[256] = {0}, distinct = 0, i;
	uint64_t done = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return result_error("open %s: %s", path, strerror(errno));
	if (count > RANDOM_MAX)
		return result_error("at most %d bytes at once", RANDOM_MAX);
	while (done < count) {
		ssize_t got = read(fd, bytes + done, count - done);

		if (got <= 0)
			return result_error("read of %s after %llu bytes: %s", path, (unsigned long long)done,
					    got ? strerror(errno) : "end of file");
		done += (uint64_t)got;
	}
	for (i = 0; i < count; i++)
		if (!seen[bytes[i]]++)
			distinct++;
	for (i = 0; i < count && i < 32; i++)
		sprintf(hexadecimal + 2 * i, "%02x", bytes[i]);
	result_print("bytes", "%llu", (unsigned long long)done);
	result_print("distinct", "%u", distinct);
	result_print("first", "%s", hexadecimal);
	return 0;
}

static int command_stress(char **argument)
{
	struct stress stress = {
		.fd = disk_open(argument[0], O_RDWR),
		.offset = number(argument[1]),
		.length = number(argument[2]),
		.seed = (uint32_t)number(argument[3]),
		.threads = (unsigned int)number(argument[4]),
		.depth = (unsigned int)number(argument[5]),
		.requests = (unsigned int)number(argument[6]),
	};

	return stress_run(&stress);
}

static int usage(void)
{
	fputs("usage: diskcheck LABEL info|flush DISK\n"
	      "       diskcheck LABEL write|verify DISK OFFSET LENGTH SEED\n"
	      "       diskcheck LABEL discard|zeroout|zeroes DISK OFFSET LENGTH\n"
	      "       diskcheck LABEL stress DISK OFFSET LENGTH SEED THREADS DEPTH REQUESTS\n"
	      "       diskcheck LABEL random FILE BYTES\n",
	      stderr);
	return 2;
}

int main(int argc, char **argv)
{
	const char *command, *path;
	uint32_t seed;

	if (argc < 4)
		return usage();
	label = argv[1];
	command = argv[2];
	path = argv[3];
	if (argc == 4 && !strcmp(command, "info"))
		return command_info(path);
	if (argc == 4 && !strcmp(command, "flush"))
		return command_flush(path);
	if (argc == 5 && !strcmp(command, "random"))
		return command_random(path, number(argv[4]));
	if (argc == 6 && !strcmp(command, "discard"))
		return command_range(path, BLKDISCARD, number(argv[4]), number(argv[5]));
	if (argc == 6 && !strcmp(command, "zeroout"))
		return command_range(path, BLKZEROOUT, number(argv[4]), number(argv[5]));
	if (argc == 6 && !strcmp(command, "zeroes"))
		return command_verify(path, number(argv[4]), number(argv[5]), NULL);
	if (argc == 10 && !strcmp(command, "stress"))
		return command_stress(argv + 3);
	if (argc != 7)
		return usage();
	seed = (uint32_t)number(argv[6]);
	if (!strcmp(command, "write"))
		return command_write(path, number(argv[4]), number(argv[5]), seed);
	if (!strcmp(command, "verify"))
		return command_verify(path, number(argv[4]), number(argv[5]), &seed);
	return usage();
}
