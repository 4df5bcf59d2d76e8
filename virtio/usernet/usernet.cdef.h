/*
 * What Python and C share of the user network. Read by cffi and included by C; no cffi-only syntax here.
 * IPv4 addresses are in network byte order, ports are not. One thread.
 */

#define USERNET_SOCKETS_MAX 1024 /* files that one guest's network may have open: about 250 MiB of libslirp's buffers */
#define USERNET_BOOTFILE_SIZE 128 /* BOOTP's field for it (RFC 951), with the terminating zero */
#define USERNET_HOSTNAME_SIZE 33 /* what libslirp keeps of a name, with the terminating zero */

struct usernet_setup {
	uint32_t network, netmask; /* of the guest's network, and in it: */
	uint32_t host;             /* the router, behind which this host is */
	uint32_t dns;
	uint32_t dhcp_start;
	uint32_t mtu;              /* 0: Ethernet's 1500 */
	uint8_t restricted;        /* nothing goes out; forwards still work */
	uint8_t host_loopback;     /* `host` reaches what listens at 127.0.0.1 here */
	uint8_t ipv6;
	uint8_t tftp;              /* the files below the current folder are read by TFTP at `host` */
	char bootfile[128];        /* told by DHCP; "": none */
	char hostname[33];         /* likewise */
	int frames_fd;             /* a frame a message, non-blocking; not closed */
	int stop_fd;               /* usernet_run ends when it is readable, or hangs up; not closed */
};

struct usernet;

/* NULL: libslirp does not take that setup. */
struct usernet *usernet_new(const struct usernet_setup *setup);
void usernet_free(struct usernet *net);
/* Pass what comes to a port of this host on to a port of the guest. 0, or a negative errno. */
int usernet_forward(struct usernet *net, uint32_t udp, uint32_t host, uint32_t host_port, uint32_t guest,
		    uint32_t guest_port);
/*
 * From now on this process may talk to networks, read files and manage its own memory, and no more. 0, a negative errno,
 * or 1 where there is no filter for this processor.
 */
int usernet_confine(void);
/* Until stop_fd says so: 0, or a negative errno. */
int usernet_run(struct usernet *net);
const char *usernet_version(void);
