/*
 * Guest memory: mappings (one mmap a region, refcounted) and memory tables (immutable lists of them, refcounted).
 * A change of memory makes a new table; whoever still works with the old one holds a reference to it.
 */
#include "memory/memory.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define HUGETLBFS_MAGIC 0x958458f6 /* linux/magic.h */

/* The unit in which the file is mapped, and must be unmapped: munmap(2) refuses anything else of huge pages. */
static uint64_t page_size(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) == 0 && (uint32_t)fs.f_type == HUGETLBFS_MAGIC)
		return (uint64_t)fs.f_bsize;
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

static uint64_t round_up(uint64_t size, uint64_t page)
{
	return (size + page - 1) & ~(page - 1);
}

int file_system(int fd, uint32_t *magic)
{
	struct statfs st;

	if (fstatfs(fd, &st) < 0)
		return -errno;
	*magic = (uint32_t)st.f_type;
	return 0;
}

struct mapping *mapping_new(int fd, uint64_t offset, uint64_t size, int *error)
{
	uint64_t page, skew, whole;
	struct mapping *m;
	struct stat st;
	uint8_t *base;

	if (size == 0 || offset + size < offset || offset + size > INT64_MAX) {
		*error = -EINVAL;
		return NULL;
	}
	if (fstat(fd, &st) < 0) {
		*error = -errno;
		return NULL;
	}
	/* A file that ends inside the region would only fault later. It may still shrink: see memory/sigbus.c. */
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < offset + size) {
		*error = DP_E_SHORT_FILE;
		return NULL;
	}
	m = calloc(1, sizeof(*m));
	if (!m) {
		*error = -ENOMEM;
		return NULL;
	}
	/* Whole pages of the file, which may be huge ones: map from the start of the first, skip the skew. */
	page = page_size(fd);
	skew = offset & (page - 1);
	whole = round_up(size + skew, page);
	base = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)(offset - skew));
	if (base == MAP_FAILED) {
		*error = -errno;
		free(m);
		return NULL;
	}
	madvise(base, whole, MADV_DONTDUMP);
	m->map_base = base;
	m->map_size = whole;
	m->base = base + skew;
	m->size = size;
	m->refs = 1;
	m->slot = sigbus_guard(m);
	if (m->slot < 0) {
		*error = m->slot;
		munmap(base, m->map_size);
		free(m);
		return NULL;
	}
	*error = 0;
	return m;
}

void mapping_unref(struct mapping *m)
{
	if (!m || __atomic_sub_fetch(&m->refs, 1, __ATOMIC_ACQ_REL) > 0)
		return;
	sigbus_unguard(m);
	munmap(m->map_base, m->map_size);
	free(m);
}

int mapping_dead(struct mapping *m)
{
	return load_acquire(&m->dead);
}

void *mapping_base(struct mapping *m)
{
	return m->base;
}

static int region_by_gpa(const void *a, const void *b)
{
	const struct memory_region *x = a, *y = b;

	return x->gpa < y->gpa ? -1 : x->gpa > y->gpa;
}

struct memory_table *memory_table_new(const struct memory_region *regions, uint32_t count)
{
	struct memory_table *t = malloc(sizeof(*t) + count * sizeof(t->regions[0]));

	if (!t)
		return NULL;
	t->refs = 1;
	t->count = count;
	for (uint32_t i = 0; i < count; i++) {
		t->regions[i] = regions[i];
		__atomic_add_fetch(&regions[i].mapping->refs, 1, __ATOMIC_RELAXED);
	}
	qsort(t->regions, count, sizeof(t->regions[0]), region_by_gpa);
	return t;
}

struct memory_table *memory_table_ref(struct memory_table *t)
{
	if (t)
		__atomic_add_fetch(&t->refs, 1, __ATOMIC_RELAXED);
	return t;
}

void memory_table_unref(struct memory_table *t)
{
	if (!t || __atomic_sub_fetch(&t->refs, 1, __ATOMIC_ACQ_REL) > 0)
		return;
	for (uint32_t i = 0; i < t->count; i++)
		mapping_unref(t->regions[i].mapping);
	free(t);
}

bool memory_table_dead(const struct memory_table *t)
{
	for (uint32_t i = 0; i < t->count; i++)
		if (load_acquire(&t->regions[i].mapping->dead))
			return true;
	return false;
}

/* Bytes of [start, start + len) that lie in a region of `size` bytes from `base` on; start is inside it. */
static int64_t clamp(uint64_t start, uint64_t base, uint64_t size, uint64_t len)
{
	uint64_t left = size - (start - base);

	return (int64_t)(len < left ? len : left);
}

int64_t memory_table_gpa(const struct memory_table *t, uint64_t gpa, uint64_t len, uint8_t **hva)
{
	uint32_t lo = 0, hi = t->count;

	while (lo < hi) { /* first region that begins after gpa */
		uint32_t mid = lo + (hi - lo) / 2;

		if (t->regions[mid].gpa <= gpa)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo == 0 || gpa - t->regions[lo - 1].gpa >= t->regions[lo - 1].size)
		return TRANSLATE_BAD;
	*hva = t->regions[lo - 1].mapping->base + (gpa - t->regions[lo - 1].gpa);
	return clamp(gpa, t->regions[lo - 1].gpa, t->regions[lo - 1].size, len);
}

int64_t memory_table_uva(const struct memory_table *t, uint64_t uva, uint64_t len, uint8_t **hva)
{
	for (uint32_t i = 0; i < t->count; i++) {
		const struct memory_region *r = &t->regions[i];

		if (uva < r->uva || uva - r->uva >= r->size)
			continue;
		*hva = r->mapping->base + (uva - r->uva);
		return clamp(uva, r->uva, r->size, len);
	}
	return TRANSLATE_BAD;
}
