/*
 * ringsize INTERFACE [ENTRIES]: the sizes of a network interface's rings, "receive N transmit N"; with ENTRIES, first
 * asks the driver for rings of that size, as `ethtool -G` does.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <linux/ethtool.h>
#include <linux/if.h>
#include <linux/sockios.h>

static int fail(const char *what)
{
	fprintf(stderr, "ringsize: %s: %s\n", what, strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	struct ethtool_ringparam rings = { .cmd = ETHTOOL_GRINGPARAM };
	struct ifreq request = { .ifr_data = (void *)&rings };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (argc < 2 || argc > 3) {
		fprintf(stderr, "ringsize INTERFACE [ENTRIES]\n");
		return 2;
	}
	if (fd < 0)
		return fail("socket");
	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", argv[1]);
	if (ioctl(fd, SIOCETHTOOL, &request) < 0)
		return fail(argv[1]);
	if (argc == 3) {
		rings.cmd = ETHTOOL_SRINGPARAM;
		rings.rx_pending = rings.tx_pending = (unsigned int)strtoul(argv[2], NULL, 10);
		if (ioctl(fd, SIOCETHTOOL, &request) < 0)
			return fail(argv[2]);
		rings.cmd = ETHTOOL_GRINGPARAM;
		if (ioctl(fd, SIOCETHTOOL, &request) < 0)
			return fail(argv[1]);
	}
	printf("receive %u transmit %u\n", rings.rx_pending, rings.tx_pending);
	return 0;
}
