/*
 * Between Python and a worker: two atomic stacks of commands. The release of a push and the acquire of a take order
 * everything; the eventfds only wake.
 */
#include "worker/worker.h"

#include <unistd.h>

static void stack_push(struct worker_command **stack, struct worker_command *command)
{
	struct worker_command *head = load_relaxed(stack);

	do
		command->next = head;
	while (!__atomic_compare_exchange_n(stack, &head, command, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
}

static struct worker_command *stack_take(struct worker_command **stack)
{
	struct worker_command *list = __atomic_exchange_n(stack, NULL, __ATOMIC_ACQ_REL), *ordered = NULL;

	while (list) { /* posted first, done first */
		struct worker_command *next = list->next;

		list->next = ordered;
		ordered = list;
		list = next;
	}
	return ordered;
}

static void wake(int fd)
{
	uint64_t one = 1;

	if (write(fd, &one, sizeof(one)) < 0)
		return; /* our own non-blocking eventfd, full: whoever reads it has not read it yet */
}

void worker_post(struct worker *w, struct worker_command *command)
{
	stack_push(&w->inbox, command);
	worker_wake(w);
}

void worker_wake(struct worker *w)
{
	/* Pairs with the fence in worker_sleep: either it sees what was pushed, or we see it sleeping. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (load_relaxed(&w->sleeping))
		wake(w->wake_fd);
}

struct worker_command *worker_take_done(struct worker *w)
{
	return stack_take(&w->done);
}

void worker_acknowledge(struct worker *w, struct worker_command *command, int result)
{
	command->result = result;
	stack_push(&w->done, command);
	wake(w->done_fd);
}

struct worker_command *worker_take_inbox(struct worker *w)
{
	return load_relaxed(&w->inbox) ? stack_take(&w->inbox) : NULL;
}
