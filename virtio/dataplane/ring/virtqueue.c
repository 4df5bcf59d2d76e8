/* What both ring formats share: setting up, gathering a chain, breaking, signalling. Section 2.6 to 2.8. */
#include "ring/virtqueue.h"

#include <stdlib.h>
#include <unistd.h>

#define VIRTIO_F_INDIRECT_DESC 28
#define VIRTIO_F_EVENT_IDX 29
#define VIRTIO_F_RING_PACKED 34

struct virtqueue *virtqueue_new(uint32_t index, int event_fd)
{
	struct virtqueue *vq = calloc(1, sizeof(*vq));

	if (!vq)
		return NULL;
	vq->index = index;
	vq->event_fd = event_fd;
	vq->call_fd = vq->err_fd = -1;
	for (uint32_t kind = 0; kind < DOORBELL_KINDS; kind++)
		vq->doorbell_fds[kind] = -1;
	return vq;
}

void virtqueue_forget(struct virtqueue *vq)
{
	memory_table_unref(vq->table);
	memory_table_unref(vq->ring_table);
	iotlb_unref(vq->iotlb);
	free(vq->inflight_heads);
	vq->table = vq->ring_table = NULL;
	vq->iotlb = NULL;
	vq->inflight_heads = NULL;
	vq->configured = vq->resolved = vq->parked = vq->unsaid = false;
	vq->inflight = 0;
	vq->epoch++;
	store_release(&vq->fault, VQ_FAULT_NONE);
	store_release(&vq->miss, 0);
	store_release(&vq->moved, 0);
	memset(&vq->report, 0, sizeof(vq->report));
	guest_wait_reset(vq, 0);
}

void virtqueue_free(struct virtqueue *vq)
{
	if (!vq)
		return;
	virtqueue_forget(vq);
	for (uint32_t kind = 0; kind < DOORBELL_KINDS; kind++)
		virtqueue_set_doorbell(vq, kind, -1);
	virtqueue_set_call(vq, -1);
	virtqueue_set_err(vq, -1);
	interrupt_status_unref(vq->interrupt_status);
	free(vq);
}

int virtqueue_configure(struct virtqueue *vq, const struct queue_setup *setup, struct memory_table *table,
			struct iotlb *tlb)
{
	bool packed = setup->features >> VIRTIO_F_RING_PACKED & 1;
	uint64_t other_align = packed ? 4 : 2;
	int rc;

	virtqueue_forget(vq);
	/* 2.7: a split queue's size is a power of two; 2.8: a packed one's need not be. */
	if (setup->size == 0 || setup->size > QUEUE_SIZE_MAX || (!packed && (setup->size & (setup->size - 1))))
		return DP_E_RING_SIZE;
	if (setup->desc & 15 || setup->avail & (other_align - 1) || setup->used & 3)
		return DP_E_RING_ALIGN;
	vq->ops = packed ? &packed_ops : &split_ops;
	vq->size = setup->size;
	vq->space = setup->space;
	vq->event_idx = setup->features >> VIRTIO_F_EVENT_IDX & 1;
	vq->indirect = setup->features >> VIRTIO_F_INDIRECT_DESC & 1;
	vq->in_order = setup->in_order;
	vq->desc_addr = setup->desc;
	vq->avail_addr = setup->avail;
	vq->used_addr = setup->used;
	rc = vq->ops->set_base(vq, setup->base);
	if (rc < 0)
		return rc;
	vq->inflight_heads = calloc(packed ? 65536 / 64 : (setup->size + 63) / 64, sizeof(uint64_t));
	if (!vq->inflight_heads)
		return -ENOMEM;
	vq->table = memory_table_ref(table);
	/* The transport decides, not the feature: with VIRTIO_F_ACCESS_PLATFORM and no IOMMU, addresses are physical. */
	vq->iotlb = setup->space == VQ_SPACE_IOVA ? iotlb_ref(tlb) : NULL;
	vq->deaths_seen = load_acquire(&sigbus_deaths) - 1; /* look once, at the first pop */
	vq->configured = true;
	return 0;
}

/* Everything that must hold before the ring is read: 0, VQ_MISS or VQ_BROKEN. */
static int ring_ready(struct virtqueue *vq)
{
	if (unlikely(load_relaxed(&vq->fault)))
		return VQ_BROKEN;
	if (unlikely(vq->parked))
		return VQ_MISS;
	if (unlikely(vq->iotlb && vq->resolved && vq->iotlb_generation != iotlb_generation(vq->iotlb)))
		vq->resolved = false;
	return unlikely(!vq->resolved) ? virtqueue_resolve(vq) : 0;
}

void virtqueue_set_memory(struct virtqueue *vq, struct memory_table *table)
{
	if (!vq->configured)
		return;
	memory_table_unref(vq->table);
	vq->table = memory_table_ref(table);
	vq->resolved = false;
	vq->deaths_seen = load_acquire(&sigbus_deaths) - 1;
	/*
	 * At once, so that the old table can go. Behind an IOMMU this may miss: until the answer comes, completions
	 * still reach the driver through the old table, which the ring keeps.
	 */
	ring_ready(vq);
}

void virtqueue_set_memory_at_rest(struct virtqueue *vq, struct memory_table *table)
{
	if (!vq->configured)
		return;
	memory_table_unref(vq->table);
	memory_table_unref(vq->ring_table);
	vq->table = memory_table_ref(table);
	vq->ring_table = NULL;
	vq->resolved = false;
	vq->deaths_seen = load_acquire(&sigbus_deaths) - 1;
}

int virtqueue_memory_alive(struct virtqueue *vq)
{
	uint32_t deaths = load_acquire(&sigbus_deaths);

	if (likely(deaths == vq->deaths_seen))
		return 0;
	if (memory_table_dead(vq->table))
		return virtqueue_fail(vq, VQ_FAULT_MEMORY_GONE, 0, 0, 0);
	vq->deaths_seen = deaths;
	return 0;
}

/* ---- popping and pushing ---- */

int virtqueue_pop(struct virtqueue *vq, struct chain_view *chain)
{
	uint64_t bit;
	int rc = ring_ready(vq);

	if (unlikely(rc))
		return rc;
	rc = vq->ops->pop(vq, chain);
	if (unlikely(virtqueue_memory_alive(vq) < 0))
		return VQ_BROKEN;
	if (rc != VQ_CHAIN)
		return rc;
	/* A head the driver has not got back yet cannot come again (2.7.13, 2.8.21); it also bounds what is in flight. */
	bit = 1ull << (chain->head & 63);
	if (unlikely(vq->inflight_heads[chain->head / 64] & bit))
		return virtqueue_fail(vq, VQ_FAULT_HEAD_INFLIGHT, chain->head, 0, 0);
	vq->inflight_heads[chain->head / 64] |= bit;
	vq->inflight++;
	vq->popped++;
	return VQ_CHAIN;
}

void virtqueue_unpop(struct virtqueue *vq, const uint32_t *heads, uint32_t count, uint32_t slots)
{
	for (uint32_t i = 0; i < count; i++)
		vq->inflight_heads[heads[i] / 64] &= ~(1ull << (heads[i] & 63));
	vq->inflight -= count;
	vq->popped -= count;
	if (count)
		vq->ops->rewind(vq, count, slots);
}

void virtqueue_push(struct virtqueue *vq, uint32_t head, uint32_t slots, uint32_t written)
{
	vq->inflight_heads[head / 64] &= ~(1ull << (head & 63));
	vq->inflight--;
	if (unlikely(!vq->ring_table || load_relaxed(&vq->fault)))
		return;
	vq->ops->push(vq, head, slots, written);
	vq->unsaid = true;
}

void virtqueue_publish(struct virtqueue *vq)
{
	if (likely(vq->ring_table && !load_relaxed(&vq->fault)))
		vq->ops->publish(vq);
}

bool virtqueue_runnable(struct virtqueue *vq)
{
	return vq->configured && !vq->parked && !load_relaxed(&vq->fault);
}

bool virtqueue_has_work(struct virtqueue *vq)
{
	/* A ring that is not resolved yet is work: the pop will resolve it, or say what is missing. */
	return virtqueue_runnable(vq) && (!vq->resolved || vq->ops->has_work(vq));
}

int virtqueue_arm(struct virtqueue *vq)
{
	if (!virtqueue_runnable(vq) || ring_ready(vq) != 0)
		return 1; /* nothing to wait for that a kick could bring; RESUME or a new setup will */
	vq->ops->arm(vq);
	return !vq->ops->has_work(vq);
}

void virtqueue_disarm(struct virtqueue *vq)
{
	if (vq->ring_table && virtqueue_runnable(vq))
		vq->ops->disarm(vq);
}

uint32_t virtqueue_base(struct virtqueue *vq)
{
	return vq->configured ? vq->ops->base(vq) : 0;
}
