/* The thread that a measuring guest rings: it counts every ring, whoever makes it, and ends when it is told to. */
#include "vmm.h"
#include "check.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define RINGS 2000
#define RINGERS 3

static void *ring_often(void *argument)
{
	uint64_t one = 1;

	for (int i = 0; i < RINGS; i++)
		CHECK(write(*(int *)argument, &one, sizeof(one)) == sizeof(one));
	return NULL;
}

static void wait_until(uint64_t *word, uint64_t value)
{
	while (__atomic_load_n(word, __ATOMIC_ACQUIRE) < value)
		sched_yield();
	CHECK(__atomic_load_n(word, __ATOMIC_ACQUIRE) == value);
}

static void counts_all_rings(int ram_fd, uint64_t *page, uint64_t gpa)
{
	int bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), given = dup(bell), error = 0;
	struct acknowledger *a;
	pthread_t ringers[RINGERS];

	page[0] = 77; /* of somebody before */
	page[1] = 5;  /* the guest's, and not touched */
	a = acknowledger_new(given, ram_fd, gpa, &error);
	CHECK(a && error == 0);
	close(given); /* it has a duplicate */
	for (int i = 0; i < RINGERS; i++)
		CHECK(pthread_create(&ringers[i], NULL, ring_often, &bell) == 0);
	for (int i = 0; i < RINGERS; i++)
		pthread_join(ringers[i], NULL);
	wait_until(page, RINGERS * RINGS);
	CHECK(page[1] == 5);
	acknowledger_free(a);
	close(bell);
}

static void ends_though_never_rung(int ram_fd, uint64_t gpa)
{
	int bell = eventfd(0, EFD_CLOEXEC), error = 0; /* a blocking one does no harm */

	for (int i = 0; i < 50; i++) {
		struct acknowledger *a = acknowledger_new(bell, ram_fd, gpa, &error);

		CHECK(a);
		acknowledger_free(a);
	}
	close(bell);
}

static void says_why_it_cannot_start(int ram_fd)
{
	int bell = eventfd(0, EFD_CLOEXEC), error = 0;

	CHECK(!acknowledger_new(-1, ram_fd, 0, &error) && error == -EBADF);
	CHECK(!acknowledger_new(bell, -1, 0, &error) && error == -EBADF);
	CHECK(!acknowledger_new(bell, ram_fd, 1, &error) && error == -EINVAL);
	close(bell);
}

static void guest_is_code_and_its_loop_takes_time(void)
{
	CHECK(ring_guest_size() > 0 && ring_guest_size() < 4096);
	CHECK(ring_guest_code()[0] == 0x31 || ring_guest_code()[0] == 0x33); /* xor ebx, ebx */
	CHECK(host_loop(0) == 0);
	CHECK(host_loop(100000) > host_loop(10));
}

int main(void)
{
	const size_t size = 0x4000, gpa = 0x2000;
	int ram_fd = memfd_create("ram", MFD_CLOEXEC);
	uint8_t *ram;

	CHECK(ram_fd >= 0 && ftruncate(ram_fd, size) == 0);
	ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
	CHECK(ram != MAP_FAILED);
	counts_all_rings(ram_fd, (uint64_t *)(ram + gpa), gpa);
	ends_though_never_rung(ram_fd, gpa);
	says_why_it_cannot_start(ram_fd);
	guest_is_code_and_its_loop_takes_time();
	munmap(ram, size);
	close(ram_fd);
	return 0;
}
