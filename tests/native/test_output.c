/*
 * What guests print, from several threads to a reader that sleeps until it is told: everything arrives in order, or is
 * counted as dropped, and the last byte wakes the reader like the first.
 */
#include "vmm.h"
#include "check.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define PRINTERS 2

struct printer {
	struct output *output;
	int event_fd;
	uint32_t index, count;
};

/* Each byte says who printed it (the top bit) and, modulo 128, as which of its bytes. */
static void *print(void *argument)
{
	struct printer *p = argument;

	for (uint32_t i = 0; i < p->count; i++) {
		uint8_t byte = (uint8_t)(p->index << 7 | i % 128);

		if (output_put(p->output, &byte, 1))
			wake(p->event_fd);
	}
	return NULL;
}

static void all_of_it_arrives(uint32_t count)
{
	static struct output output;
	struct printer printers[PRINTERS];
	pthread_t threads[PRINTERS];
	uint32_t seen[PRINTERS] = { 0 };
	uint64_t ignored;
	int event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	struct pollfd p = { .fd = event_fd, .events = POLLIN };

	output_init(&output);
	for (uint32_t i = 0; i < PRINTERS; i++) {
		printers[i] = (struct printer){ &output, event_fd, i, count };
		CHECK(pthread_create(&threads[i], NULL, print, &printers[i]) == 0);
	}
	while (seen[0] + seen[1] < PRINTERS * count) {
		uint8_t bytes[100];
		uint32_t got;

		CHECK(poll(&p, 1, 20000) == 1); /* told, or it is lost */
		CHECK(read(event_fd, &ignored, sizeof(ignored)) == sizeof(ignored));
		while ((got = output_take(&output, bytes, sizeof(bytes))) > 0)
			for (uint32_t i = 0; i < got; i++)
				CHECK(bytes[i] % 128 == seen[bytes[i] >> 7]++ % 128);
	}
	for (uint32_t i = 0; i < PRINTERS; i++)
		pthread_join(threads[i], NULL);
	CHECK(output_dropped(&output) == 0);
	pthread_mutex_destroy(&output.lock);
	close(event_fd);
}

static void what_does_not_fit_is_counted(void)
{
	static struct output output;
	static uint8_t bytes[OUTPUT_BYTES + 1000];
	uint8_t last = 'z';

	output_init(&output);
	for (uint32_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)(i / 3);
	CHECK(output_put(&output, bytes, sizeof(bytes)));
	CHECK(output_dropped(&output) == 1000);
	CHECK(!output_put(&output, &last, 1)); /* its reader is told already */
	CHECK(output_dropped(&output) == 1001);
	for (uint32_t at = 0; at < OUTPUT_BYTES; at += 4096) {
		uint8_t part[4096];

		CHECK(output_take(&output, part, sizeof(part)) == sizeof(part));
		CHECK(memcmp(part, bytes + at, sizeof(part)) == 0);
	}
	CHECK(output_take(&output, bytes, 1) == 0);
	CHECK(output_put(&output, &last, 1)); /* it fits again, and the reader is told again */
	CHECK(output_take(&output, bytes, 2) == 1 && bytes[0] == 'z');
	pthread_mutex_destroy(&output.lock);
}

int main(int argc, char **argv)
{
	uint32_t count = argc > 1 ? (uint32_t)atoi(argv[1]) : 30000; /* two of them fit: none may be dropped */

	alarm(100);
	CHECK(PRINTERS * count <= OUTPUT_BYTES);
	all_of_it_arrives(count);
	what_does_not_fit_is_counted();
	printf("ok\n");
	return 0;
}
