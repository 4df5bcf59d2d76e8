/*
 * The thread that a measuring guest rings: it waits for an eventfd as a device's thread does, and stores into the guest's
 * memory how often it was rung in all. The guest spins for that, so it times the whole way with its own clock.
 */
#include "vmm.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

struct acknowledger {
	int event_fd; /* a duplicate; non-blocking or not, for it is read when it is readable */
	int stop_fd;
	uint64_t *word; /* guest memory: [0] is ours to store, the guest's is the rest */
	void *page;
	size_t page_size;
	pthread_t thread;
};

static void *acknowledger_main(void *argument)
{
	struct acknowledger *a = argument;
	struct pollfd fds[2] = { { .fd = a->event_fd, .events = POLLIN }, { .fd = a->stop_fd, .events = POLLIN } };
	uint64_t rung = 0, count;

	while (!(fds[1].revents & POLLIN)) {
		if (poll(fds, ARRAY_SIZE(fds), -1) < 0)
			continue; /* EINTR */
		if ((fds[0].revents & POLLIN) && read(a->event_fd, &count, sizeof(count)) == sizeof(count)) {
			rung += count;
			store_release(a->word, rung);
		}
	}
	return NULL;
}

static void acknowledger_release(struct acknowledger *a)
{
	if (a->page != MAP_FAILED)
		munmap(a->page, a->page_size);
	if (a->stop_fd >= 0)
		close(a->stop_fd);
	if (a->event_fd >= 0)
		close(a->event_fd);
	free(a);
}

struct acknowledger *acknowledger_new(int event_fd, int ram_fd, uint64_t gpa, int *error)
{
	struct acknowledger *a = calloc(1, sizeof(*a));

	if (!a) {
		*error = -ENOMEM;
		return NULL;
	}
	a->page_size = (size_t)sysconf(_SC_PAGESIZE);
	a->event_fd = fcntl(event_fd, F_DUPFD_CLOEXEC, 0);
	a->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	a->page = mmap(NULL, a->page_size, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, (off_t)gpa);
	*error = a->event_fd < 0 || a->stop_fd < 0 || a->page == MAP_FAILED ? -errno : 0;
	if (*error == 0) {
		a->word = a->page;
		store_relaxed(a->word, 0);
		*error = thread_start(&a->thread, acknowledger_main, a, "hb-waiter");
	}
	if (*error) {
		acknowledger_release(a);
		return NULL;
	}
	return a;
}

void acknowledger_free(struct acknowledger *a)
{
	uint64_t one = 1;

	while (write(a->stop_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
	pthread_join(a->thread, NULL);
	acknowledger_release(a);
}
