/*
 * Register accesses from several vCPU threads to one who answers: each gets its own answer, a stop releases those who
 * wait, an answer that comes too late changes nothing, and after it all goes on as before.
 */
#include "vmm.h"
#include "check.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define ASKERS 3

struct asker {
	struct handover handover;
	int event_fd;
	uint32_t index, rounds;
	uint32_t answered; /* atomic, and so is the next */
	uint32_t ended;
};

static uint64_t expected(uint32_t index, uint32_t round)
{
	return ((uint64_t)index << 32 | round) * 0x9e3779b97f4a7c15ull;
}

static void *ask(void *argument)
{
	struct asker *a = argument;
	struct handover *h = &a->handover;

	for (uint32_t i = 0; i < a->rounds; i++) {
		h->access = (struct access){ .vcpu = a->index, .offset = i, .length = 4, .data = i };
		if (!handover_ask(h, a->event_fd))
			break;
		CHECK(h->access.data == expected(a->index, i));
		store_relaxed(&a->answered, load_relaxed(&a->answered) + 1);
	}
	store_release(&a->ended, 1);
	wake(a->event_fd);
	return NULL;
}

static void event_wait(int event_fd)
{
	struct pollfd p = { .fd = event_fd, .events = POLLIN };
	uint64_t count;

	CHECK(poll(&p, 1, -1) == 1);
	CHECK(read(event_fd, &count, sizeof(count)) == sizeof(count));
}

static void askers_start(struct asker *askers, pthread_t *threads, int event_fd, uint32_t rounds)
{
	for (uint32_t i = 0; i < ASKERS; i++) {
		askers[i].event_fd = event_fd;
		askers[i].index = i;
		askers[i].rounds = rounds;
		askers[i].answered = askers[i].ended = 0;
		handover_reset(&askers[i].handover);
		CHECK(pthread_create(&threads[i], NULL, ask, &askers[i]) == 0);
	}
}

static uint32_t ended(struct asker *askers)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < ASKERS; i++)
		count += load_acquire(&askers[i].ended);
	return count;
}

static void everyone_gets_their_own_answer(uint32_t rounds)
{
	static struct asker askers[ASKERS];
	pthread_t threads[ASKERS];
	struct access access;
	int event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

	askers_start(askers, threads, event_fd, rounds);
	while (ended(askers) < ASKERS) {
		event_wait(event_fd);
		for (uint32_t i = 0; i < ASKERS; i++) {
			if (!handover_take(&askers[i].handover, &access))
				continue;
			CHECK(access.vcpu == i && access.data == access.offset);
			CHECK(!handover_take(&askers[i].handover, &access)); /* taken is taken */
			handover_answer(&askers[i].handover, expected(i, access.offset));
		}
	}
	for (uint32_t i = 0; i < ASKERS; i++) {
		pthread_join(threads[i], NULL);
		CHECK(askers[i].answered == rounds);
	}
	close(event_fd);
}

/* Stop at every stage: nobody has asked yet, some wait to be taken, some are taken, some were just answered. */
static void a_stop_releases_all(uint32_t times)
{
	static struct asker askers[ASKERS];
	pthread_t threads[ASKERS];
	struct access access;
	int event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

	for (uint32_t round = 0; round < times; round++) {
		uint32_t answers = round % 5;
		bool taken[ASKERS] = { false };

		askers_start(askers, threads, event_fd, UINT32_MAX);
		while (answers > 0) {
			event_wait(event_fd);
			for (uint32_t i = 0; i < ASKERS && answers > 0; i++) {
				if (taken[i] || !handover_take(&askers[i].handover, &access))
					continue;
				if (--answers % 2 == 0)
					taken[i] = true; /* and the answer comes too late */
				else
					handover_answer(&askers[i].handover, expected(i, access.offset));
			}
			if (taken[0] && taken[1] && taken[2])
				break;
		}
		for (uint32_t i = 0; i < ASKERS; i++)
			handover_abandon(&askers[i].handover);
		for (uint32_t i = 0; i < ASKERS; i++) {
			handover_answer(&askers[i].handover, 0);
			CHECK(!handover_take(&askers[i].handover, &access));
			pthread_join(threads[i], NULL);
		}
		CHECK(ended(askers) == ASKERS);
		CHECK(!handover_ask(&askers[0].handover, event_fd)); /* nobody may ask before it is set back */
	}
	close(event_fd);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 5000;

	alarm(100);
	everyone_gets_their_own_answer(rounds);
	a_stop_releases_all(rounds / 10);
	printf("ok\n");
	return 0;
}
