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

int main(void)
{
	alarm(100);
	test_a_turn_of_frames_ends_by_their_bytes();
	test_a_turn_of_frames_through_a_descriptor_ends_by_the_clock();
	return 0;
}
