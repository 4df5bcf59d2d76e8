/*
 * One slot a vCPU. The thread that asks sleeps on the slot's state until Python answers or the VM stops; every change
 * of hands is one atomic operation on that state, so an answer that comes too late finds the slot abandoned and is
 * dropped.
 */
#include "vmm.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

static bool move(struct handover *h, uint32_t from, uint32_t to)
{
	return __atomic_compare_exchange_n(&h->state, &from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static void state_wake(struct handover *h)
{
	syscall(SYS_futex, &h->state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

void handover_reset(struct handover *h)
{
	store_release(&h->state, HANDOVER_IDLE);
}

bool handover_ask(struct handover *h, int event_fd)
{
	uint32_t state;

	if (!move(h, HANDOVER_IDLE, HANDOVER_ASKED))
		return false;
	wake(event_fd);
	while ((state = load_acquire(&h->state)) == HANDOVER_ASKED || state == HANDOVER_TAKEN)
		syscall(SYS_futex, &h->state, FUTEX_WAIT_PRIVATE, state, NULL, NULL, 0);
	return move(h, HANDOVER_ANSWERED, HANDOVER_IDLE);
}

bool handover_take(struct handover *h, struct access *out)
{
	if (load_relaxed(&h->state) != HANDOVER_ASKED || !move(h, HANDOVER_ASKED, HANDOVER_TAKEN))
		return false;
	*out = h->access; /* its thread neither reads nor writes it before the answer, or for good when abandoned */
	return true;
}

void handover_answer(struct handover *h, uint64_t data)
{
	if (load_acquire(&h->state) != HANDOVER_TAKEN)
		return;
	h->access.data = data;
	if (move(h, HANDOVER_TAKEN, HANDOVER_ANSWERED))
		state_wake(h);
}

void handover_abandon(struct handover *h)
{
	__atomic_store_n(&h->state, HANDOVER_ABANDONED, __ATOMIC_RELEASE);
	state_wake(h);
}
