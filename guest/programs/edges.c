/*
 * edges CHIP LINE rising|falling|both: a line for each edge of a GPIO line, "rising" or "falling", until it is killed.
 *
 * "watching" says that it has the line from now on.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/gpio.h>

static int fail(const char *what)
{
	fprintf(stderr, "edges: %s: %s\n", what, strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	struct gpio_v2_line_request request = { .num_lines = 1, .consumer = "edges" };
	struct gpio_v2_line_event event;
	int chip;

	if (argc != 4) {
		fprintf(stderr, "edges CHIP LINE rising|falling|both\n");
		return 2;
	}
	request.offsets[0] = (unsigned int)strtoul(argv[2], NULL, 10);
	request.config.flags = GPIO_V2_LINE_FLAG_INPUT;
	if (strcmp(argv[3], "falling"))
		request.config.flags |= GPIO_V2_LINE_FLAG_EDGE_RISING;
	if (strcmp(argv[3], "rising"))
		request.config.flags |= GPIO_V2_LINE_FLAG_EDGE_FALLING;
	chip = open(argv[1], O_RDWR | O_CLOEXEC);
	if (chip < 0)
		return fail(argv[1]);
	if (ioctl(chip, GPIO_V2_GET_LINE_IOCTL, &request))
		return fail("the line");
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("watching\n");
	while (read(request.fd, &event, sizeof(event)) == (ssize_t)sizeof(event))
		printf("%s\n", event.id == GPIO_V2_LINE_EVENT_RISING_EDGE ? "rising" : "falling");
	return fail("its edges");
}
