/*
 * Gathering a chain: each descriptor is accounted, checked and translated here, whatever ring it came from.
 * Nothing of a chain is used before all of it is checked. Sections 2.7.4, 2.7.5, 2.8.5 to 2.8.7.
 */
#include "ring/virtqueue.h"

void chain_begin(struct chain_view *chain)
{
	chain->descriptors = 0;
	chain->readable_count = chain->writable_count = 0;
	chain->readable_len = chain->writable_len = 0;
}

int chain_add(struct virtqueue *vq, struct chain_view *chain, const struct desc *d, uint32_t head)
{
	bool write = d->flags & VRING_DESC_F_WRITE;
	uint64_t addr = d->addr, left = d->len;

	if (unlikely(++chain->descriptors > CHAIN_DESCRIPTORS_MAX))
		return virtqueue_fail(vq, VQ_FAULT_CHAIN_LENGTH, head, d->addr, d->len);
	if (unlikely(left == 0))
		return virtqueue_fail(vq, VQ_FAULT_EMPTY_BUFFER, head, d->addr, 0);
	/* 2.7.4.2: device-writable descriptors come after all device-readable ones. */
	if (unlikely(!write && chain->writable_count))
		return virtqueue_fail(vq, VQ_FAULT_ORDER, head, d->addr, d->len);
	if (unlikely(chain->readable_len + chain->writable_len + left > UINT32_MAX))
		return virtqueue_fail(vq, VQ_FAULT_TOTAL_LENGTH, head, d->addr, d->len);
	if (unlikely(addr + (left - 1) < addr)) /* the last byte of all addresses is one, too */
		return virtqueue_fail(vq, VQ_FAULT_ADDRESS, head, d->addr, d->len);
	if (write)
		chain->writable_len += left;
	else
		chain->readable_len += left;
	while (left) { /* more than one round only where a buffer crosses from one region into the next */
		uint32_t at = chain->readable_count + chain->writable_count;
		uint8_t *hva;
		int n;

		n = virtqueue_translate(vq, addr, left, write ? DP_PERM_WRITE : DP_PERM_READ, &hva);
		if (unlikely(n == VQ_MISS))
			return VQ_MISS;
		if (unlikely(n <= 0))
			return virtqueue_fail(vq, VQ_FAULT_ADDRESS, head, d->addr, d->len);
		if (unlikely(at == CHAIN_IOV_MAX))
			return virtqueue_fail(vq, VQ_FAULT_PIECES, head, d->addr, d->len);
		chain->iov[at] = (struct iovec){ hva, (size_t)n };
		if (write)
			chain->writable_count++;
		else
			chain->readable_count++;
		addr += (uint64_t)n;
		left -= (uint64_t)n;
	}
	return 0;
}

/* A copy of entry `i` of an indirect table. The table may cross regions and need not be aligned. */
static int table_entry(struct virtqueue *vq, const struct desc *table, uint32_t i, bool packed, struct desc *d)
{
	uint8_t bytes[16], *hva;
	uint64_t words[2];
	uint32_t got = 0;

	while (got < 16) {
		int n = virtqueue_translate(vq, table->addr + 16ull * i + got, 16 - got, DP_PERM_READ, &hva);

		if (n == VQ_MISS)
			return VQ_MISS;
		if (n <= 0)
			return VQ_BROKEN;
		if (n == 16 && !((uintptr_t)hva & 7)) { /* the usual case */
			words[0] = load_relaxed((const uint64_t *)hva);
			words[1] = load_relaxed((const uint64_t *)hva + 1);
			*d = desc_unpack(words[0], words[1], packed);
			return 0;
		}
		for (int k = 0; k < n; k++)
			bytes[got + (uint32_t)k] = load_relaxed(&hva[k]);
		got += (uint32_t)n;
	}
	memcpy(words, bytes, sizeof(words));
	*d = desc_unpack(words[0], words[1], packed);
	return 0;
}

int chain_add_indirect(struct virtqueue *vq, struct chain_view *chain, const struct desc *table, uint32_t head,
		       bool packed)
{
	uint32_t count = table->len / 16, i = 0;
	struct desc d;
	int rc;

	if (!vq->indirect)
		return virtqueue_fail(vq, VQ_FAULT_INDIRECT_FEATURE, head, table->addr, table->len);
	/* 2.7.5.3.1: a table's descriptor has no NEXT. Its WRITE flag is ignored (2.7.5.3.2). */
	if (table->flags & VRING_DESC_F_NEXT)
		return virtqueue_fail(vq, VQ_FAULT_INDIRECT_NEXT, head, table->addr, table->len);
	if (table->len == 0 || table->len % 16 || count > CHAIN_DESCRIPTORS_MAX || table->addr + table->len < table->addr)
		return virtqueue_fail(vq, VQ_FAULT_INDIRECT_SIZE, head, table->addr, table->len);
	for (uint32_t steps = 0; steps < count; steps++) {
		rc = table_entry(vq, table, i, packed, &d);
		if (rc == VQ_MISS)
			return VQ_MISS;
		if (rc < 0)
			return virtqueue_fail(vq, VQ_FAULT_ADDRESS, head, table->addr, table->len);
		if (d.flags & VRING_DESC_F_INDIRECT)
			return virtqueue_fail(vq, VQ_FAULT_INDIRECT_NESTED, head, d.addr, d.len);
		rc = chain_add(vq, chain, &d, head);
		if (rc)
			return rc;
		if (packed) {
			i++;
			continue;
		}
		if (!(d.flags & VRING_DESC_F_NEXT))
			return 0;
		if (d.next >= count)
			return virtqueue_fail(vq, VQ_FAULT_NEXT, head, d.next, count);
		i = d.next;
	}
	return packed ? 0 : virtqueue_fail(vq, VQ_FAULT_CHAIN_LENGTH, head, table->addr, table->len);
}
