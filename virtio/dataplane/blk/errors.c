/*
 * What storage answered with an error: counted by request and errno, for Python to log and to show.
 *
 * One wake-up of Python reports any number of errors: the eventfd is written only where Python has looked since the
 * last one, so a guest that makes its disk fail all the time costs the event loop nothing.
 */
#include "blk/blk.h"

#include <unistd.h>

void blk_raise_news(struct blk_device *blk)
{
	uint64_t one = 1;

	if (__atomic_exchange_n(&blk->news, 1, __ATOMIC_ACQ_REL) || blk->setup.news_fd < 0)
		return;
	if (write(blk->setup.news_fd, &one, sizeof(one)) < 0)
		return; /* our own non-blocking eventfd, full: it will be read */
}

/* Any worker thread; only where something failed. `error`: an errno, or BLK_FILE_ENDED. */
void blk_count_error(struct blk_device *blk, uint32_t op, int error)
{
	__atomic_add_fetch(&blk->errors.counts[op][error < BLK_ERRNOS ? error : BLK_ERRNOS - 1], 1, __ATOMIC_RELAXED);
	blk_raise_news(blk);
}

void blk_count_sync_error(struct blk_device *blk, uint32_t op, int error)
{
	uint32_t none = 0;

	/* The first one stays: it is what the storage said, later ones may only be what came of it. */
	__atomic_compare_exchange_n(&blk->errors.sync_error, &none, (uint32_t)error, false, __ATOMIC_ACQ_REL,
				    __ATOMIC_RELAXED);
	blk_count_error(blk, op, error);
}

const struct blk_errors *blk_errors(struct native_device *device)
{
	return &((struct blk_device *)device)->errors;
}

void blk_await_news(struct native_device *device)
{
	__atomic_store_n(&((struct blk_device *)device)->news, 0, __ATOMIC_SEQ_CST);
}
