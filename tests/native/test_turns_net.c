/* What a network interface's queue may do before the next queue of its worker has its turn, in rounds. */
#include "by_hand.h"
#include "net/net.h"

#include <sys/socket.h>
#include <unistd.h>

static struct native_device *nic_new(uint32_t backend, int fd)
{
	struct net_setup setup = { .backend = backend, .pairs = 1, .fds = { fd }, .mac = { 2, 0, 0, 0, 0, 1 } };
	struct native_device *nic;
	int error;

	nic = net_new(&setup, NULL, &error);
	CHECK(nic);
	net_set_features(nic, 1ull << VIRTIO_F_VERSION_1);
	return nic;
}

/* The first queue is now the transmit queue of `nic`. */
static void become_nic(struct table *t, struct native_device *nic)
{
	struct queue_setup ring = driver_setup(&t->drivers[0]);

	command(t, WORKER_DETACH, 0);
	virtqueue_free(t->queues[0]);
	native_device_unref(t->disks[0]);
	t->disks[0] = nic;
	t->queues[0] = virtqueue_new(1, t->worker.done_fd);
	CHECK(virtqueue_configure(t->queues[0], &ring, t->guest->table, NULL) == 0);
	command(t, WORKER_ATTACH, 0);
}

static void send_frames(struct table *t, uint32_t count, uint32_t bytes)
{
	for (uint32_t tag = 0; tag < count; tag++) {
		struct piece piece = { area(0) + DATA_AT, NET_HEADER_SIZE + bytes, false };

		memset(guest_at(t->guest, piece.gpa), 0, NET_HEADER_SIZE);
		*(uint8_t *)guest_at(t->guest, area(0) + DRIVER_AREA + tag * 64 + 48) = 0; /* collect's */
		driver_add(&t->drivers[0], tag, &piece, 1, false);
	}
}

static void test_a_turn_of_frames_ends_by_their_bytes(void)
{
	struct table t;

	table_open(&t, DISK_MEMORY, UINT64_MAX);
	become_nic(&t, nic_new(NET_BACKEND_REFLECT, -1));
	send_frames(&t, 32, 65000);
	CHECK(rounds_until(&t, 32, false) == 2);
	send_frames(&t, 32, 60);
	CHECK(rounds_until(&t, 32, false) == 1);
	table_close(&t);
}

static void test_a_turn_of_frames_through_a_descriptor_ends_by_the_clock(void)
{
	struct table t;
	uint8_t frame[128];
	int ends[2];

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
	table_open(&t, DISK_MEMORY, 0);
	become_nic(&t, nic_new(NET_BACKEND_DATAGRAM, ends[0]));
	send_frames(&t, 32, 60);
	CHECK(rounds_until(&t, 32, false) == 2);
	for (uint32_t i = 0; i < 32; i++)
		CHECK(recv(ends[1], frame, sizeof(frame), 0) == 60);
	table_close(&t);
	close(ends[0]);
	close(ends[1]);
}

/* ---- a switch ---- */

#define PORTS 24
#define LONG_FRAME 65000u
#define RARP_BYTES 60u

struct port {
	struct native_device *nic;
	struct virtqueue *vq; /* the first one transmits, the others receive */
	struct driver driver;
};

static void port_open(struct table *t, struct port *port, struct net_switch *lan, uint32_t number)
{
	struct net_setup setup = { .backend = NET_BACKEND_SWITCH, .pairs = 1, .fds = { -1 },
				   .mac = { 2, 0, 0, 0, 1, (uint8_t)number } };
	struct worker_command attach = { .op = WORKER_ATTACH, .fd = -1 };
	struct queue_setup ring;
	int error;

	port->nic = net_new(&setup, lan, &error);
	CHECK(port->nic);
	net_set_features(port->nic, 1ull << VIRTIO_F_VERSION_1);
	driver_init(&port->driver, t->guest, area(0) + (1 + number) * (uint64_t)DRIVER_AREA, false, false);
	port->vq = virtqueue_new(number ? 0 : 1, t->worker.done_fd);
	ring = driver_setup(&port->driver);
	CHECK(virtqueue_configure(port->vq, &ring, t->guest->table, NULL) == 0);
	attach.vq = port->vq;
	attach.device = port->nic;
	worker_post(&t->worker, &attach);
	worker_round(&t->worker);
	CHECK(worker_take_done(&t->worker) == &attach && attach.result == 0);
}

static void port_close(struct table *t, struct port *port)
{
	struct worker_command detach = { .op = WORKER_DETACH, .fd = -1, .vq = port->vq };

	worker_post(&t->worker, &detach);
	while (!worker_take_done(&t->worker))
		worker_round(&t->worker);
	virtqueue_free(port->vq);
	native_device_unref(port->nic);
}

struct lan {
	struct table table;
	struct net_switch *lan;
	struct port ports[PORTS + 1]; /* the first one sends to all, long frames */
	uint64_t buffers;             /* everybody's: what is in them is of no interest */
	uint32_t heard[PORTS + 1];    /* long frames, each */
};

static void lan_open(struct lan *lan)
{
	lan->lan = net_switch_new();
	lan->buffers = area(1) + DRIVER_AREA;
	table_open(&lan->table, DISK_MEMORY, UINT64_MAX);
	for (uint32_t i = 0; i <= PORTS; i++) {
		port_open(&lan->table, &lan->ports[i], lan->lan, i);
		lan->heard[i] = 0;
	}
	for (uint32_t i = 1; i <= PORTS; i++)
		for (uint32_t n = 0; n < 2; n++)
			driver_add(&lan->ports[i].driver, n,
				   &(struct piece){ lan->buffers, NET_HEADER_SIZE + LONG_FRAME, true }, 1, false);
	memset(guest_at(lan->table.guest, lan->buffers), 0, NET_HEADER_SIZE);
	memset(guest_at(lan->table.guest, lan->buffers + NET_HEADER_SIZE), 0xff, 6);
	memcpy(guest_at(lan->table.guest, lan->buffers + NET_HEADER_SIZE + 6), (uint8_t[]){ 2, 0, 0, 0, 1, 0 }, 6);
}

static void lan_close(struct lan *lan)
{
	for (uint32_t i = 0; i <= PORTS; i++)
		port_close(&lan->table, &lan->ports[i]);
	net_switch_unref(lan->lan);
	table_close(&lan->table);
}

static void lan_send(struct lan *lan, uint32_t tag)
{
	driver_add(&lan->ports[0].driver, tag, &(struct piece){ lan->buffers, NET_HEADER_SIZE + LONG_FRAME, false }, 1,
		   false);
}

/* A round: how many ports hear a frame of so many bytes. */
static uint32_t lan_round(struct lan *lan, uint32_t bytes)
{
	uint32_t now = 0, tag, written;

	worker_round(&lan->table.worker);
	for (uint32_t i = 1; i <= PORTS; i++)
		while (driver_used(&lan->ports[i].driver, &tag, &written)) {
			CHECK(written == NET_HEADER_SIZE + bytes);
			lan->heard[i]++;
			now++;
		}
	return now;
}

static bool lan_sent(struct lan *lan)
{
	uint32_t tag, written;

	return driver_used(&lan->ports[0].driver, &tag, &written);
}

/* Who hears it after how many rounds; each exactly once, though its turn is cut in between. */
static void test_a_flood_of_a_long_frame_takes_several_turns(void)
{
	uint32_t heard = 0, rounds = 0;
	struct net_counters sum;
	struct lan lan;

	lan_open(&lan);
	lan_send(&lan, 0);
	while (heard < PORTS) {
		uint32_t now = lan_round(&lan, LONG_FRAME);

		CHECK(++rounds < 10);
		CHECK(now <= WORKER_TURN_BYTES / LONG_FRAME + 1);
		heard += now;
	}
	CHECK(rounds == 2 && lan_sent(&lan));
	CHECK(lan_round(&lan, LONG_FRAME) == 0);
	for (uint32_t i = 1; i <= PORTS; i++)
		CHECK(lan.heard[i] == 1);
	net_counters_sum(lan.ports[0].nic, &sum);
	CHECK(sum.flooded == 1 && sum.dropped == 0);
	lan_close(&lan);
}

/* The place where it was cut is its own: what is sent behind it reaches everybody. */
static void test_a_flood_that_is_given_up_leaves_nothing_to_the_next(void)
{
	uint32_t first, rounds = 0;
	struct net_counters sum;
	struct lan lan;

	lan_open(&lan);
	lan_send(&lan, 0);
	first = lan_round(&lan, LONG_FRAME);
	CHECK(first > 0 && first < PORTS && !lan_sent(&lan));
	net_set_link(lan.ports[0].nic, false);
	CHECK(lan_round(&lan, LONG_FRAME) == 0 && lan_sent(&lan));
	net_set_link(lan.ports[0].nic, true);
	lan_send(&lan, 1);
	for (uint32_t heard = 0; heard < PORTS; heard += lan_round(&lan, LONG_FRAME))
		CHECK(++rounds < 10);
	CHECK(lan_sent(&lan));
	for (uint32_t i = 1; i <= PORTS; i++)
		CHECK(lan.heard[i] == (i <= first ? 2 : 1));
	net_counters_sum(lan.ports[0].nic, &sum);
	CHECK(sum.flooded == 2 && sum.sent_link_down == 1 && sum.dropped == 0);
	lan_close(&lan);
}

/* A turn before it that moved all it may takes nothing from it. */
static void test_an_announcement_reaches_everybody_at_once(void)
{
	struct worker_command nudge = { .op = WORKER_NUDGE, .fd = -1 };
	struct lan lan;

	lan_open(&lan);
	nudge.device = lan.ports[0].nic;
	net_prepare_rarp(nudge.device, (uint8_t[]){ 2, 0, 0, 0, 1, 0 });
	lan.table.worker.moved = WORKER_TURN_BYTES;
	worker_post(&lan.table.worker, &nudge);
	CHECK(lan_round(&lan, RARP_BYTES) == PORTS);
	CHECK(worker_take_done(&lan.table.worker) == &nudge && nudge.result == 0);
	lan_close(&lan);
}

int main(void)
{
	alarm(100);
	test_a_turn_of_frames_ends_by_their_bytes();
	test_a_turn_of_frames_through_a_descriptor_ends_by_the_clock();
	test_a_flood_of_a_long_frame_takes_several_turns();
	test_a_flood_that_is_given_up_leaves_nothing_to_the_next();
	test_an_announcement_reaches_everybody_at_once();
	return 0;
}
