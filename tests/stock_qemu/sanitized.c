/*
 * The library without QEMU, under the sanitizers: its threads, its table of doorbells, its copies of CPUID, with a KVM
 * made up here and a daemon that registers, withdraws, vanishes and talks nonsense. Ends with 0 when all held.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload.h"

#define ROUNDS 400
#define SHAKERS 3
#define PORTS 20
#define KEY_GIVEN 0x123456
#define VM_FD 1000	/* no file: only the KVM below knows it */
#define ARRAYS 3000
#define REPLACEMENTS 20

#define CHECK(condition) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			_exit(1); \
		} \
	} while (0)

/* KVM: ids, and what it was given for CPUID */

static pthread_mutex_t kvm_lock = PTHREAD_MUTEX_INITIALIZER;
static bool has_id[KEY_MASK + 1];
static int id_count;
static atomic_int assigned_total, changes_total;
static bool full;	/* KVM_SET_CPUID2 says E2BIG to whatever was changed */
static uint32_t nent_given;

static int change_id(const struct kvm_hyperv_eventfd *change)
{
	int error = 0;

	CHECK(!(change->conn_id & ~KEY_MASK));
	changes_total++;
	pthread_mutex_lock(&kvm_lock);
	if (change->flags & KVM_HYPERV_EVENTFD_DEASSIGN) {
		error = has_id[change->conn_id] ? 0 : ENOENT;
		id_count -= has_id[change->conn_id];
		has_id[change->conn_id] = false;
	} else {
		CHECK(fcntl(change->fd, F_GETFD) >= 0);	/* not closed under our hands */
		error = has_id[change->conn_id] ? EEXIST : 0;
		id_count += !has_id[change->conn_id];
		has_id[change->conn_id] = true;
		assigned_total++;
	}
	pthread_mutex_unlock(&kvm_lock);
	errno = error;
	return error ? -1 : 0;
}

int kvm_ioctl(int fd, unsigned long request, void *argument)
{
	(void)fd;
	switch (request) {
	case KVM_CHECK_EXTENSION:
		return 1;
	case KVM_GET_STATS_FD:
		return eventfd(0, 0);
	case KVM_HYPERV_EVENTFD:
		return change_id(argument);
	case KVM_SET_CPUID2:
		if (full && ((struct kvm_cpuid2 *)argument)->nent != nent_given) {
			errno = E2BIG;
			return -1;
		}
		return 0;
	}
	errno = ENOTTY;
	return -1;
}

/* The daemon */

static int listener;
static atomic_bool daemon_ends;

static bool send_message(int sock, uint16_t type, const struct wire_message *about)
{
	struct wire_message message = {
		.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = type, .bell = about->bell, .serial = about->serial,
	};

	return send(sock, &message, sizeof(message), MSG_NOSIGNAL) == sizeof(message);
}

/* One connection: take what comes, order at random, end at random, sometimes with nonsense. */
static void converse(int sock, unsigned int *seed)
{
	struct wire_message message;
	int rest = 20 + rand_r(seed) % 200;

	while (!daemon_ends && rest > 0) {
		union {
			char room[CMSG_SPACE(4 * sizeof(int))];
			struct cmsghdr align;
		} control;
		struct iovec part = { .iov_base = &message, .iov_len = sizeof(message) };
		struct msghdr header = {
			.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof(control.room),
		};
		struct cmsghdr *passed;
		ssize_t received = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);

		if (received < 0 && errno == EAGAIN)
			continue;	/* the library has nothing to say: is this to go on? */
		if (received != sizeof(message))
			return;
		rest--;
		passed = CMSG_FIRSTHDR(&header);
		if (passed)
			close(*(int *)CMSG_DATA(passed));
		CHECK((passed != NULL) == (message.type == WIRE_BELL || message.type == WIRE_VCPU));
		if (message.type == WIRE_VM)
			send_message(sock, WIRE_WELCOME, &message);
		if (message.type == WIRE_BELL || message.type == WIRE_ANSWER)
			send_message(sock, rand_r(seed) % 3 ? WIRE_REGISTER : WIRE_WITHDRAW, &message);
	}
	if (rand_r(seed) % 2)
		(void)!send(sock, "nonsense", 8, MSG_NOSIGNAL);
}

static void *run_daemon(void *argument)
{
	const struct timeval wait = { .tv_usec = 20000 };
	unsigned int seed = 1;

	(void)argument;
	while (!daemon_ends) {
		int sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

		if (sock < 0)
			break;
		CHECK(!setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait)));
		converse(sock, &seed);
		close(sock);
	}
	return NULL;
}

/* One connection of a VM with one bell, which is ordered about until the library closes it. */
static void *flood(void *argument)
{
	struct wire_message bell = { .type = 0 }, ignored;
	uint16_t type = WIRE_REGISTER;
	int sock = -1;

	(void)argument;
	while (bell.type != WIRE_BELL) {	/* recv() drops the descriptor that comes along */
		if (sock >= 0 && recv(sock, &bell, sizeof(bell), 0) == sizeof(bell))
			continue;
		if (sock >= 0)
			close(sock);	/* of the VM before, which had none */
		sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		CHECK(sock >= 0);
	}
	while (send_message(sock, type, &bell)) {
		type ^= WIRE_REGISTER ^ WIRE_WITHDRAW;
		while (recv(sock, &ignored, sizeof(ignored), MSG_DONTWAIT) > 0)
			;
	}
	close(sock);
	return NULL;
}

static void listen_at(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	strcpy(address.sun_path, path);
	unlink(path);
	listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	CHECK(listener >= 0 && !bind(listener, (struct sockaddr *)&address, sizeof(address)) && !listen(listener, 4));
}

/* QEMU */

static void ring_bell(uint16_t port, int fd, bool away)
{
	struct kvm_ioeventfd change = {
		.addr = port, .len = 2, .fd = fd,
		.flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH | (away ? KVM_IOEVENTFD_FLAG_DEASSIGN : 0),
	};

	ioeventfd_changed(VM_FD, &change);
}

static void *shake(void *argument)
{
	uint16_t first = (uint16_t)(0x1000 + 0x100 * (uintptr_t)argument);
	int fd = eventfd(0, EFD_CLOEXEC);

	for (int round = 0; round < ROUNDS; round++)
		for (int half = 0; half < 2; half++)
			for (uint16_t port = first; port < first + PORTS; port++)
				ring_bell(port, fd, half);
	close(fd);
	return NULL;
}

static struct kvm_cpuid2 *leaves(uint32_t count, bool hyperv, unsigned int *seed)
{
	/* Exactly as large as it says: whoever reads further is caught. */
	struct kvm_cpuid2 *cpuid = malloc(sizeof(*cpuid) + count * sizeof(cpuid->entries[0]));

	CHECK(cpuid);
	memset(cpuid, 0, sizeof(*cpuid) + count * sizeof(cpuid->entries[0]));
	cpuid->nent = count;
	for (uint32_t i = 0; i < count; i++) {
		cpuid->entries[i].function = rand_r(seed) % 4 ? 0x40000000u + (unsigned)rand_r(seed) % 0x20100 :
								(unsigned)rand_r(seed);
		cpuid->entries[i].eax = (unsigned)rand_r(seed);
	}
	if (hyperv && count)
		cpuid->entries[count - 1] = (struct kvm_cpuid_entry2){ .function = 0x40000001, .eax = 0x31237648 };
	return cpuid;
}

static void copy_many_leaves(void)
{
	unsigned int seed = 2;

	for (int i = 0; i < ARRAYS; i++) {
		struct kvm_cpuid2 *given = leaves((uint32_t)rand_r(&seed) % 400, i % 2, &seed);
		struct kvm_cpuid2 *copy = cpuid_with_key(given, KEY_GIVEN);

		CHECK(given->nent != 1 || cpuid_has_hyperv(given) == (i % 2));
		if (copy) {
			const struct kvm_cpuid_entry2 *base = &copy->entries[given->nent];

			CHECK(copy->nent == given->nent + 2 && !(base[0].function & 0xff));
			CHECK(base[0].eax == base[1].function && base[1].ebx == KEY_GIVEN);
			for (uint32_t k = 0; k < given->nent; k++)
				CHECK(given->entries[k].function - base[0].function >= 0x100);
		}
		(void)cpuid_may_nest(given);
		free(copy);
		free(given);
	}
	CHECK(!cpuid_with_key(&(struct kvm_cpuid2){ .nent = 0xffffffff }, 1));
}

static int descriptor_count(void)
{
	int count = 0;

	for (int fd = 0; fd < 1024; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void give_leaves(uint32_t number)
{
	unsigned int seed = 3;
	struct kvm_cpuid2 *given = leaves(9, true, &seed);

	nent_given = given->nent;
	vcpu_created(VM_FD, VM_FD + 1 + (int)number, number);
	CHECK(!vcpu_set_cpuid(VM_FD + 1 + (int)number, given));
	free(given);
}

static void wait_until_ids(int least)
{
	while (assigned_total < least)
		sched_yield();
}

/* A VM's file is closed and its number is another VM's: orders for the first that are under way are not carried out. */
static void replace_under_orders(void)
{
	for (int i = 0; i < REPLACEMENTS; i++) {
		pthread_t daemon_thread;
		int fd = eventfd(0, EFD_CLOEXEC), assigned = assigned_total, before;

		CHECK(!pthread_create(&daemon_thread, NULL, flood, NULL));
		vm_created(VM_FD);
		give_leaves(0);
		ring_bell(0x3000, fd, false);
		wait_until_ids(assigned + 20);
		vm_created(VM_FD);
		before = changes_total;
		pthread_join(daemon_thread, NULL);	/* the first VM's thread has ended */
		CHECK(changes_total == before);
		pthread_mutex_lock(&kvm_lock);
		has_id[0x300000 ^ KEY_GIVEN] = false;	/* KVM's went with its VM */
		id_count = 0;
		pthread_mutex_unlock(&kvm_lock);
		close(fd);
	}
}

int main(int argc, char **argv)
{
	pthread_t daemon_thread, shakers[SHAKERS];
	int before, fd;

	CHECK(argc == 2);
	copy_many_leaves();
	listen_at(argv[1]);
	before = descriptor_count();
	setenv("HYPERBELL_SOCKET", argv[1], 1);
	setenv("HYPERBELL_KEY", "123456", 1);
	replace_under_orders();
	CHECK(!pthread_create(&daemon_thread, NULL, run_daemon, NULL));
	vm_created(VM_FD);
	CHECK(!getenv("HYPERBELL_SOCKET") && !getenv("HYPERBELL_KEY"));
	for (uint32_t number = 0; number < 4; number++)
		give_leaves(number);
	for (uintptr_t i = 0; i < SHAKERS; i++)
		CHECK(!pthread_create(&shakers[i], NULL, shake, (void *)i));
	for (int i = 0; i < SHAKERS; i++)
		pthread_join(shakers[i], NULL);
	CHECK(id_count == 0);	/* every doorbell took its id along */

	fd = eventfd(0, EFD_CLOEXEC);
	ring_bell(0x2000, fd, false);
	wait_until_ids(assigned_total + 1);	/* the daemon goes on ordering, connection after connection */
	full = true;
	give_leaves(4);
	CHECK(id_count == 0);	/* one vCPU without the leaf: no ids any more */
	ring_bell(0x2000, fd, true);
	close(fd);

	/* Another VM in its place: the thread of the first frees all that was its own. */
	daemon_ends = true;
	shutdown(listener, SHUT_RDWR);
	pthread_join(daemon_thread, NULL);
	vm_created(VM_FD);
	while (descriptor_count() > before + 1)	/* the second VM's eventfd to wake it */
		sched_yield();
	return 0;
}
