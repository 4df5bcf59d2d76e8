/* The native network device: net/. */

#define NET_OP_RECEIVE 0  /* to the guest */
#define NET_OP_TRANSMIT 1 /* from the guest */
#define NET_OP_CONTROL 2

#define NET_BACKEND_DROP 0
#define NET_BACKEND_REFLECT 1
#define NET_BACKEND_SWITCH 2
#define NET_BACKEND_TAP 3      /* fds of one tap interface, a queue each, with a virtio header of 12 bytes */
#define NET_BACKEND_DATAGRAM 4 /* a socket with one frame a message */

#define NET_PAIRS_MAX 16
#define NET_SWITCH_PORTS_MAX 1024

struct net_switch; /* refcounted; its ports are driven by one worker */

struct net_setup {
	uint32_t backend;       /* NET_BACKEND_* */
	uint32_t pairs;
	int fds[NET_PAIRS_MAX]; /* TAP and DATAGRAM: non-blocking; duplicates are made */
	uint8_t mac[6];
	uint32_t keeps_mac;     /* SWITCH: no other port may send with that address */
};

struct net_counters { /* frames lost, by reason; one set a pair, written by its worker, relaxed; read by anyone */
	/* from the guest */
	uint64_t malformed;       /* with a header that lies, or no frame */
	uint64_t sent_link_down;
	uint64_t sent_disabled;   /* on a transmit queue that the front-end disabled */
	uint64_t dropped;         /* nobody there to take it */
	uint64_t spoofed;         /* with the address of another port of the switch, which keeps it */
	/* for the guest */
	uint64_t no_buffers;      /* which had no receive buffers */
	uint64_t refused;         /* larger than its buffers or its MTU */
	uint64_t received_link_down;
	uint64_t filtered;        /* for an address it does not want to hear */
	uint64_t misreceived;     /* no frame, or one with a header that no receiver understands */
	/* not lost */
	uint64_t flooded;         /* by a switch, to all its ports */
};

struct net_switch *net_switch_new(void);
void net_switch_unref(struct net_switch *lan);
/* `lan` for NET_BACKEND_SWITCH, else NULL; takes a reference. */
struct native_device *net_new(const struct net_setup *setup, struct net_switch *lan, int *error);
/* Any thread, at any time. Other features than before: what the driver said by its control queue is forgotten. */
void net_set_features(struct native_device *device, uint64_t features);
void net_set_link(struct native_device *device, uint32_t up);
/* 5.1.4.1: with VIRTIO_NET_F_MTU no packet is longer for the driver; 0: nobody said what it is. */
void net_set_mtu(struct native_device *device, uint32_t mtu);
/* Any thread: what is sent on that pair is taken and lost. A turn that has begun may not know yet. */
void net_mute(struct native_device *device, uint32_t pair, uint32_t on);
/* 5.1.4: ask the driver to announce itself; true until it has acknowledged that. */
void net_ask_to_announce(struct native_device *device);
uint32_t net_announcing(struct native_device *device);
/* The address that the driver goes by: its own choice, or net_setup's. */
void net_mac(struct native_device *device, uint8_t mac[6]);
void net_set_mac(struct native_device *device, const uint8_t mac[6]);
/* How many pairs frames for the guest are spread over now. */
uint32_t net_active_pairs(struct native_device *device);
/* Have WORKER_NUDGE to the worker of the first pair send a RARP request for `mac` to the other side. */
void net_prepare_rarp(struct native_device *device, const uint8_t mac[6]);
/* The sum over all pairs. */
void net_counters_sum(struct native_device *device, struct net_counters *sum);
