/*
 * Headers that lie and frames that are none, by the thousand, through a switch to a guest that does not segment or sum:
 * nothing outside a frame is touched, every frame comes back, and neither queue breaks. The control queue likewise.
 * Drivers are modern or legacy, whose headers differ in length, and become the other at any moment.
 */
#include "load.h"
#include "net/net.h"

#include <sys/eventfd.h>
#include <unistd.h>

#define SENT_MAX (NET_HEADER_SIZE + NET_FRAME_MAX + 100)
#define TX_STRIDE 0x12000u
#define RX_BYTES 2048u
#define PORT_BYTES (3 * DRIVER_AREA + 2 * TX_STRIDE + DRIVER_TAGS * RX_BYTES)
#define LEGACY (1ull << VIRTIO_NET_F_CTRL_VQ)
#define MODERN (LEGACY | 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_NET_F_MRG_RXBUF)
#define FROM_GUEST                                                                                                     \
	(1ull << VIRTIO_NET_F_CSUM | 1ull << VIRTIO_NET_F_HOST_TSO4 | 1ull << VIRTIO_NET_F_HOST_TSO6 |                 \
	 1ull << VIRTIO_NET_F_HOST_ECN | 1ull << VIRTIO_NET_F_HOST_USO)
#define CONTROLS                                                                                                       \
	(1ull << VIRTIO_NET_F_CTRL_RX | 1ull << VIRTIO_NET_F_CTRL_MAC_ADDR | 1ull << VIRTIO_NET_F_GUEST_ANNOUNCE)

enum { RX, TX, CONTROL, QUEUES };

struct port {
	struct guest *guest;
	struct native_device *nic;
	struct virtqueue *vq[QUEUES];
	struct driver driver[QUEUES];
	int kick[QUEUES];
	uint64_t data_gpa, rx_gpa;
};

/* A port of `lan`; without one, of a back end that reflects. */
static void port_open(struct port *p, struct rig *rig, struct net_switch *lan, uint64_t features, bool packed)
{
	struct net_setup setup = { .backend = lan ? NET_BACKEND_SWITCH : NET_BACKEND_REFLECT, .pairs = 1,
				   .mac = { 2, 0, 0, 0, 0, 1 } };
	int error;

	p->guest = guest_new(PORT_BYTES, false);
	p->nic = net_new(&setup, lan, &error);
	CHECK(p->nic);
	net_set_features(p->nic, features);
	for (uint32_t q = 0; q < QUEUES; q++) {
		struct queue_setup queue;

		driver_init(&p->driver[q], p->guest, GUEST_GPA + q * DRIVER_AREA, packed, false);
		p->vq[q] = virtqueue_new(q, rig->done_fd);
		queue = driver_setup(&p->driver[q]);
		CHECK(virtqueue_configure(p->vq[q], &queue, p->guest->table, NULL) == 0);
		p->kick[q] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		CHECK(virtqueue_set_doorbell(p->vq[q], DOORBELL_KICK, dup(p->kick[q])) == 0);
		CHECK(rig_command(rig, WORKER_ATTACH, p->vq[q], p->nic, NULL, -1) == 0);
	}
	p->data_gpa = GUEST_GPA + QUEUES * DRIVER_AREA;
	p->rx_gpa = p->data_gpa + 2 * TX_STRIDE;
}

static void port_close(struct port *p, struct rig *rig)
{
	struct queue_report report;

	for (uint32_t q = 0; q < QUEUES; q++) {
		virtqueue_report(p->vq[q], &report);
		CHECK(report.fault == VQ_FAULT_NONE);
		CHECK(rig_command(rig, WORKER_DETACH, p->vq[q], NULL, NULL, -1) == 0);
		virtqueue_free(p->vq[q]);
		close(p->kick[q]);
	}
	native_device_unref(p->nic);
	guest_free(p->guest);
}

static void ring(struct port *p, uint32_t q)
{
	uint64_t one = 1;

	if (driver_needs_kick(&p->driver[q]))
		CHECK(write(p->kick[q], &one, sizeof(one)) == sizeof(one));
}

static void listen_again(struct port *p, uint64_t *random)
{
	uint32_t tag, written;

	while (driver_used(&p->driver[RX], &tag, &written))
		CHECK(written <= RX_BYTES);
	for (tag = 0; tag < DRIVER_TAGS; tag++) {
		struct piece piece = { p->rx_gpa + tag * RX_BYTES, NET_HEADER_SIZE + random_next(random) % 1900, true };

		if (!p->driver[RX].slots[tag])
			driver_add(&p->driver[RX], tag, &piece, 1, false);
	}
}

/* Add `length` bytes at the port's data as readable pieces of random sizes, and wait until they come back. */
static void send(struct port *p, uint32_t q, uint32_t length, uint32_t answer, uint64_t *random)
{
	struct piece pieces[DRIVER_PIECES];
	uint32_t count = 0, at = 0, tag, written;

	while (at < length) {
		uint32_t left = length - at, n = count == DRIVER_PIECES - 2 ? left : 1 + random_next(random) % left;

		pieces[count++] = (struct piece){ p->data_gpa + at, n, false };
		at += n;
	}
	if (answer)
		pieces[count++] = (struct piece){ p->data_gpa + TX_STRIDE, answer, true };
	driver_add(&p->driver[q], 0, pieces, count, random_next(random) & 1);
	ring(p, q);
	while (!driver_used(&p->driver[q], &tag, &written))
		__asm__ volatile("pause");
	CHECK(tag == 0 && written == (answer ? 1 : 0));
}

static void make_frame(uint8_t *at, uint32_t header_size, uint32_t length, uint64_t *random)
{
	static const uint16_t types[] = { 0x0008, 0xdd86, 0x0081, 0xa888, 0x0608 };
	static const uint8_t gso[] = { 0, 1, 4, 5, 3, 0x81, 0x84, 0xff };
	struct net_header header = {
		.flags = (uint8_t)(random_next(random) % 4 ? 1 : random_next(random)),
		.gso_type = gso[random_next(random) % ARRAY_SIZE(gso)],
		.hdr_len = (uint16_t)random_next(random),
		.gso_size = (uint16_t)(random_next(random) % 8 ? 500 + random_next(random) % 2000 : random_next(random) % 3),
		.csum_start = (uint16_t)(random_next(random) % 4 ? 34 + random_next(random) % 30 : random_next(random)),
		.csum_offset = (uint16_t)(random_next(random) % 4 ? (random_next(random) & 1 ? 16 : 6) : random_next(random)),
		.num_buffers = (uint16_t)random_next(random),
	};

	for (uint32_t i = 0; i < length && i < 200; i++)
		at[i] = (uint8_t)random_next(random);
	memcpy(at, &header, length < header_size ? length : header_size);
	if (length < header_size + ETHERNET_SIZE)
		return;
	memset(at + header_size, 0xff, 6);
	for (uint32_t tag = 0; tag < 3 && header_size + 14 + 4 * tag <= length; tag++)
		memcpy(at + header_size + 12 + 4 * tag, &types[random_next(random) % ARRAY_SIZE(types)], 2);
}

static void lies(struct rig *rig, bool packed, bool legacy, uint32_t rounds)
{
	struct net_switch *lan = net_switch_new();
	uint64_t random = 88172645463325252ull + packed + 2 * legacy, base = legacy ? LEGACY : MODERN;
	uint64_t mtu = 1ull << VIRTIO_NET_F_MTU;
	struct net_counters sent, heard;
	struct port from, to;
	uint8_t *data;

	port_open(&from, rig, lan, base | FROM_GUEST | CONTROLS, packed);
	port_open(&to, rig, lan, base | mtu, packed);
	net_switch_unref(lan);
	data = guest_at(from.guest, from.data_gpa);
	for (uint32_t i = 0; i < rounds; i++) {
		uint32_t length = i % 16 ? 1 + random_next(&random) % 3000 : 1 + random_next(&random) % SENT_MAX;

		make_frame(data, legacy ? NET_LEGACY_HEADER_SIZE : NET_HEADER_SIZE, length, &random);
		listen_again(&to, &random);
		if (random_next(&random) % 8 == 0) /* at any moment, also in the middle of a turn */
			net_mute(from.nic, 0, random_next(&random) & 1);
		if (random_next(&random) % 8 == 0)
			net_set_mtu(to.nic, random_next(&random) & 1 ? random_next(&random) % 3000 : 0);
		if (random_next(&random) % 8 == 0)
			net_set_features(to.nic, (random_next(&random) & 1 ? LEGACY : MODERN) | mtu);
		send(&from, TX, length, 0, &random);
		for (uint32_t b = 0; b < 40; b++)
			data[b] = (uint8_t)random_next(&random);
		data[0] = (uint8_t)(random_next(&random) % 6);
		data[1] = (uint8_t)(random_next(&random) % 3);
		send(&from, CONTROL, 1 + random_next(&random) % 40, 1 + i % 3, &random);
	}
	net_counters_sum(from.nic, &sent);
	net_counters_sum(to.nic, &heard);
	/* Each kind was met: what is refused at once, what only segmenting finds out, and what is honest enough. */
	CHECK(sent.malformed > rounds / 100 && sent.sent_disabled > rounds / 100 && heard.misreceived > rounds / 100);
	CHECK(heard.refused > rounds / 100);
	CHECK(load_relaxed(&virtqueue_stats(to.vq[RX])->ops[NET_OP_RECEIVE].requests) > rounds / 100);
	port_close(&from, rig);
	port_close(&to, rig);
}

/* One buffer posted for both ways, or two that overlap: what comes back is the driver's affair, but it does come back. */
static void overlaps(struct rig *rig, bool packed)
{
	static const int32_t offsets[] = { -NET_HEADER_SIZE, -1, 0, 1, 7, 64, NET_HEADER_SIZE, 700 };
	uint64_t random = 1;
	struct port p;
	uint32_t tag, written;

	port_open(&p, rig, NULL, MODERN, packed);
	for (uint32_t i = 0; i < ARRAY_SIZE(offsets); i++) {
		uint64_t at = (uint64_t)((int64_t)p.data_gpa + 64 + offsets[i]);
		struct piece room = { at, 1600, true }, sent = { p.data_gpa + 64, NET_HEADER_SIZE + 1400, false };

		memset(guest_at(p.guest, p.data_gpa), 0, 4096);
		driver_add(&p.driver[RX], 1, &room, 1, false);
		ring(&p, RX);
		driver_add(&p.driver[TX], 2, &sent, 1, random_next(&random) & 1);
		ring(&p, TX);
		while (!driver_used(&p.driver[TX], &tag, &written))
			__asm__ volatile("pause");
		CHECK(tag == 2);
		while (!driver_used(&p.driver[RX], &tag, &written))
			__asm__ volatile("pause");
		CHECK(tag == 1 && written == NET_HEADER_SIZE + 1400);
	}
	port_close(&p, rig);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 4000;

	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(100);
	for (uint32_t reactor = REACTOR_IO_URING; reactor <= REACTOR_EPOLL; reactor++) {
		struct rig rig;

		rig_open(&rig, reactor, 32);
		lies(&rig, false, false, rounds);
		lies(&rig, true, false, rounds);
		lies(&rig, false, true, rounds);
		overlaps(&rig, false);
		overlaps(&rig, true);
		rig_close(&rig);
		printf("%s: ok\n", reactor == REACTOR_EPOLL ? "epoll" : "io_uring");
	}
	return 0;
}
