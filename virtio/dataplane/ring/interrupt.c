/*
 * virtio-mmio's InterruptStatus (virtio 1.3, 4.2.2) as one word that several threads share: whoever interrupts sets
 * its bit *before* the interrupt is raised, for a driver that reads 0 drops the interrupt.
 */
#include "ring/virtqueue.h"

#include <stdlib.h>

struct interrupt_status {
	int refs;      /* atomic */
	uint32_t word; /* atomic: set by workers and Python, cleared by the vCPU thread that serves InterruptACK */
};

struct interrupt_status *interrupt_status_new(void)
{
	struct interrupt_status *status = calloc(1, sizeof(*status));

	if (status)
		status->refs = 1;
	return status;
}

struct interrupt_status *interrupt_status_ref(struct interrupt_status *status)
{
	if (status)
		__atomic_fetch_add(&status->refs, 1, __ATOMIC_RELAXED);
	return status;
}

void interrupt_status_unref(struct interrupt_status *status)
{
	if (status && __atomic_sub_fetch(&status->refs, 1, __ATOMIC_ACQ_REL) == 0)
		free(status);
}

uint32_t *interrupt_status_word(struct interrupt_status *status)
{
	return &status->word;
}

void interrupt_status_raise(struct interrupt_status *status, uint32_t bits)
{
	__atomic_fetch_or(&status->word, bits, __ATOMIC_RELEASE);
}

void interrupt_status_acknowledge(struct interrupt_status *status, uint32_t bits)
{
	__atomic_fetch_and(&status->word, ~bits, __ATOMIC_ACQ_REL);
}

uint32_t interrupt_status_value(struct interrupt_status *status)
{
	return load_acquire(&status->word);
}
