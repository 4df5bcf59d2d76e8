/* Making a driver queue: where its rings, control blocks and buffers lie in guest memory. */

#include <stdlib.h>
#include <string.h>

#include "frontend.h"

#define PAGE 4096

struct places { /* offsets, bytes */
	uint64_t avail;
	uint64_t used;
	uint64_t control;
	uint64_t control_stride;
	uint64_t data;
	uint64_t data_stride;
	uint64_t end;
};

static uint64_t round_up(uint64_t value, uint64_t unit)
{
	return (value + unit - 1) / unit * unit;
}

static uint32_t chain_length(const struct fe_setup *setup)
{
	return 2 + (setup->request_max + setup->segment - 1) / setup->segment; /* header, data, status */
}

uint32_t fe_queue_depth(const struct fe_setup *setup)
{
	return setup->indirect ? setup->queue_size : setup->queue_size / chain_length(setup);
}

static struct places find_places(const struct fe_setup *setup)
{
	uint64_t n = setup->queue_size;
	uint32_t slots = fe_queue_depth(setup);
	struct places p;

	/* 2.7 and 2.8.10.1: both rings' sizes; each area starts on a page of its own */
	p.avail = round_up(16 * n, PAGE);
	p.used = p.avail + round_up(6 + 2 * n, PAGE);
	p.control = p.used + round_up(6 + 8 * n, PAGE);
	p.control_stride = round_up(sizeof(struct control) + 16ull * chain_length(setup), 64);
	p.data = round_up(p.control + slots * p.control_stride, PAGE);
	p.data_stride = round_up(setup->request_max, PAGE);
	p.end = p.data + slots * p.data_stride;
	return p;
}

uint64_t fe_queue_bytes(const struct fe_setup *setup)
{
	return find_places(setup).end;
}

struct fe_queue *fe_queue_new(const struct fe_setup *setup, struct fe_layout *layout)
{
	struct places p = find_places(setup);
	struct fe_queue *q = calloc(1, sizeof(*q));

	if (!q)
		return NULL;
	q->setup = *setup;
	q->ops = setup->packed ? &packed_ops : &split_ops;
	q->slots = fe_queue_depth(setup);
	q->chain_max = setup->indirect ? 1 : chain_length(setup);
	q->requests = calloc(q->slots ? q->slots : 1, sizeof(*q->requests));
	q->free_ids = calloc(q->slots ? q->slots : 1, sizeof(*q->free_ids));
	if (!q->requests || !q->free_ids) {
		fe_queue_free(q);
		return NULL;
	}
	for (uint32_t i = 0; i < q->slots; i++)
		q->free_ids[q->free_count++] = q->slots - 1 - i;
	memset(setup->memory, 0, p.control);
	q->control_at = p.control;
	q->control_stride = p.control_stride;
	q->data_at = p.data;
	q->data_stride = p.data_stride;
	q->desc = setup->memory;
	q->avail = setup->memory + p.avail;
	q->used = setup->memory + p.used;
	q->avail_wrap = 1; /* 2.8.1: both counters start at 1 */
	q->used_wrap = 1;
	layout->desc = 0;
	layout->avail = p.avail;
	layout->used = p.used;
	return q;
}

void fe_queue_free(struct fe_queue *q)
{
	if (!q)
		return;
	free(q->requests);
	free(q->free_ids);
	free(q->busy);
	free(q);
}

uint32_t fe_queue_base(const struct fe_queue *q)
{
	if (!q->setup.packed)
		return q->avail_idx;
	return q->avail_idx | (uint32_t)q->avail_wrap << 15 | (uint32_t)q->last_used << 16 |
	       (uint32_t)q->used_wrap << 31;
}
