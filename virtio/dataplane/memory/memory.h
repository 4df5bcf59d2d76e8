/*
 * Guest memory as C holds it: mappings that may die, immutable tables of them, an IOMMU's translations. Nothing here
 * knows of rings.
 */
#ifndef HYPERBELL_MEMORY_H
#define HYPERBELL_MEMORY_H

#include "dataplane.h"

struct mapping {
	uint8_t *base;     /* where the region begins; const after mapping_new, as the next three */
	uint64_t size;
	uint8_t *map_base; /* what was mapped: from a page boundary of the file on */
	uint64_t map_size;
	int refs;          /* atomic */
	int dead;          /* atomic; set by the SIGBUS handler, for good */
	int slot;          /* in the SIGBUS handler's table */
};

struct memory_table {
	int refs;          /* atomic; the rest is immutable */
	uint32_t count;
	struct memory_region regions[]; /* by ascending gpa */
};

int sigbus_guard(struct mapping *m);   /* slot, or -ENOSPC */
void sigbus_unguard(struct mapping *m);
/* How many mappings died so far, in the whole process: a cheap reason to look closer. */
extern uint32_t sigbus_deaths; /* atomic */

struct memory_table *memory_table_ref(struct memory_table *t);
struct iotlb *iotlb_ref(struct iotlb *tlb);
/* True when any mapping of the table died: what was read from it is not to be trusted. */
bool memory_table_dead(const struct memory_table *t);

/*
 * Translate `addr`: how many of `len` bytes lie contiguous in our memory from *hva on (> 0),
 * or TRANSLATE_BAD, or TRANSLATE_MISS (IOTLB only; *addr_missing says which address).
 */
#define TRANSLATE_BAD -1
#define TRANSLATE_MISS -2
int64_t memory_table_gpa(const struct memory_table *t, uint64_t gpa, uint64_t len, uint8_t **hva);
int64_t memory_table_uva(const struct memory_table *t, uint64_t uva, uint64_t len, uint8_t **hva);
int64_t iotlb_translate(struct iotlb *tlb, const struct memory_table *t, uint64_t iova, uint64_t len,
			uint32_t perm, uint8_t **hva, uint64_t *missing);
uint32_t iotlb_generation(struct iotlb *tlb);

#endif
