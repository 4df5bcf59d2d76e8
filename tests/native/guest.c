/* Sections 2.7 and 2.8 from the driver's side. Deliberately written apart from the device's. */
#include "guest.h"

#include <sys/mman.h>
#include <unistd.h>

#define AVAIL_BIT (1u << 7)
#define USED_BIT (1u << 15)
#define EVENT_DISABLE 1u
#define EVENT_DESC 2u

struct guest *guest_new(uint64_t size, bool own_base)
{
	struct guest *g = calloc(1, sizeof(*g));
	struct memory_region region = { .gpa = GUEST_GPA, .size = size, .uva = GUEST_UVA };
	int error;

	CHECK(g);
	g->size = size;
	g->fd = memfd_create("guest", MFD_CLOEXEC);
	CHECK(g->fd >= 0 && ftruncate(g->fd, (off_t)size) == 0);
	g->mapping = region.mapping = mapping_new(g->fd, 0, size, &error);
	CHECK(g->mapping);
	g->table = memory_table_new(&region, 1);
	CHECK(g->table);
	g->base = mapping_base(g->mapping);
	g->own_base = own_base;
	if (own_base) {
		g->base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, g->fd, 0);
		CHECK(g->base != MAP_FAILED);
	}
	return g;
}

void guest_free(struct guest *g)
{
	if (g->own_base)
		munmap(g->base, g->size);
	memory_table_unref(g->table);
	mapping_unref(g->mapping);
	close(g->fd);
	free(g);
}

static uint16_t *word16(const struct driver *d, uint64_t gpa)
{
	return guest_at(d->guest, gpa);
}

static uint64_t *desc_at(const struct driver *d, uint32_t index)
{
	return guest_at(d->guest, d->desc + 16ull * index);
}

void driver_init(struct driver *d, struct guest *g, uint64_t area_gpa, bool packed, bool event_idx)
{
	*d = (struct driver){ .guest = g, .packed = packed, .event_idx = event_idx, .avail_wrap = true,
			      .used_wrap = true, .slots_free = DRIVER_QUEUE_SIZE };
	memset(guest_at(g, area_gpa), 0, DRIVER_AREA);
	d->desc = area_gpa + 2048; /* so that its areas cross from one page into the next */
	d->avail = d->desc + 16 * DRIVER_QUEUE_SIZE;
	d->used = d->avail + 8 + 2 * DRIVER_QUEUE_SIZE;
	d->tables = area_gpa + DRIVER_AREA / 2;
	CHECK(d->used + 6 + 8 * DRIVER_QUEUE_SIZE <= d->tables);
	CHECK(d->tables + DRIVER_TAGS * DRIVER_PIECES * 16 <= area_gpa + DRIVER_AREA);
}

struct queue_setup driver_setup(const struct driver *d)
{
	return (struct queue_setup){
		.desc = d->desc, .avail = d->avail, .used = d->used, .size = DRIVER_QUEUE_SIZE,
		.base = d->packed ? 0x80008000u : 0, .space = VQ_SPACE_GPA,
		.features = 1ull << 32 | 1ull << 28 | (uint64_t)d->event_idx << 29 | (uint64_t)d->packed << 34,
	};
}

static void desc_write(uint64_t *desc, const struct piece *p, uint16_t third, uint16_t fourth)
{
	store_relaxed(&desc[0], p->gpa);
	store_relaxed(&desc[1], (uint64_t)p->len | (uint64_t)third << 32 | (uint64_t)fourth << 48);
}

static void split_add(struct driver *d, uint32_t tag, const struct piece *pieces, uint32_t count, bool indirect)
{
	uint16_t first = (uint16_t)(tag * DRIVER_PIECES), base = indirect ? 0 : first;
	struct piece table = { d->tables + tag * DRIVER_PIECES * 16, count * 16, false };

	for (uint32_t i = 0; i < count; i++) {
		bool more = i + 1 < count;
		uint64_t *at = indirect ? (uint64_t *)guest_at(d->guest, table.gpa + 16ull * i) : desc_at(d, first + i);

		desc_write(at, &pieces[i], (uint16_t)((pieces[i].write ? VRING_DESC_F_WRITE : 0) | (more ? VRING_DESC_F_NEXT : 0)),
			   (uint16_t)(base + i + 1));
	}
	if (indirect)
		desc_write(desc_at(d, first), &table, VRING_DESC_F_INDIRECT, 0);
	store_relaxed(word16(d, d->avail + 4 + 2 * (d->avail_idx % DRIVER_QUEUE_SIZE)), first);
	d->avail_idx++;
	store_release(word16(d, d->avail + 2), d->avail_idx);
}

static void packed_add(struct driver *d, uint32_t tag, const struct piece *pieces, uint32_t count, bool indirect)
{
	struct piece table = { d->tables + tag * DRIVER_PIECES * 16, count * 16, false };
	uint16_t first = d->avail_idx;
	uint64_t first_word = 0;

	if (indirect) {
		for (uint32_t i = 0; i < count; i++)
			desc_write(guest_at(d->guest, table.gpa + 16ull * i), &pieces[i], 0,
				   pieces[i].write ? VRING_DESC_F_WRITE : 0);
		pieces = &table;
		count = 1;
	}
	for (uint32_t i = 0; i < count; i++) {
		uint16_t flags = (uint16_t)((d->avail_wrap ? AVAIL_BIT : USED_BIT) | (pieces[i].write ? VRING_DESC_F_WRITE : 0) |
					    (i + 1 < count ? VRING_DESC_F_NEXT : 0) | (indirect ? VRING_DESC_F_INDIRECT : 0));
		/* Only the last one's id counts; the others carry nonsense on purpose. */
		uint16_t id = i + 1 < count ? 0xdead : (uint16_t)tag;

		if (i == 0) { /* its word with the flags is written last, below */
			store_relaxed(&desc_at(d, first)[0], pieces[0].gpa);
			first_word = (uint64_t)pieces[0].len | (uint64_t)id << 32 | (uint64_t)flags << 48;
		} else {
			desc_write(desc_at(d, d->avail_idx), &pieces[i], id, flags);
		}
		if (++d->avail_idx == DRIVER_QUEUE_SIZE) {
			d->avail_idx = 0;
			d->avail_wrap = !d->avail_wrap;
		}
	}
	d->kicked_idx = (uint16_t)(d->kicked_idx + count);
	d->slots[tag] = (uint8_t)count;
	d->slots_free -= count;
	/*
	 * A guest stores 16 bits of flags. Here it is the whole word, which is the one the device loads: ThreadSanitizer
	 * pairs a release with an acquire of the same address only.
	 */
	store_release(&desc_at(d, first)[1], first_word);
}

void driver_add(struct driver *d, uint32_t tag, const struct piece *pieces, uint32_t count, bool indirect)
{
	CHECK(tag < DRIVER_TAGS && count <= DRIVER_PIECES && d->slots[tag] == 0);
	if (d->packed) {
		packed_add(d, tag, pieces, count, indirect);
		return;
	}
	split_add(d, tag, pieces, count, indirect);
	d->slots[tag] = 1;
}

bool driver_needs_kick(struct driver *d)
{
	uint16_t old = d->kicked_idx, off;
	uint32_t event;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!d->packed) {
		d->kicked_idx = d->avail_idx;
		if (!d->event_idx)
			return !(load_relaxed(word16(d, d->used)) & 1);
		off = load_relaxed(word16(d, d->used + 4 + 8 * DRIVER_QUEUE_SIZE));
		return (uint16_t)(d->avail_idx - off - 1) < (uint16_t)(d->avail_idx - old);
	}
	d->kicked_idx = 0;
	event = load_relaxed((uint32_t *)guest_at(d->guest, d->used));
	if ((event >> 16 & 3) != EVENT_DESC)
		return (event >> 16 & 3) != EVENT_DISABLE;
	off = event & 0x7fff;
	if ((event >> 15 & 1) != d->avail_wrap)
		off = (uint16_t)(off - DRIVER_QUEUE_SIZE);
	return (uint16_t)(d->avail_idx - off - 1) < old;
}

static bool has_used(const struct driver *d)
{
	uint16_t flags;

	if (!d->packed)
		return load_acquire(word16(d, d->used + 2)) != d->last_used;
	flags = load_acquire((uint16_t *)&desc_at(d, d->last_used)[1] + 3);
	return d->slots_free < DRIVER_QUEUE_SIZE && !!(flags & AVAIL_BIT) == d->used_wrap &&
	       !!(flags & USED_BIT) == d->used_wrap;
}

bool driver_used(struct driver *d, uint32_t *tag, uint32_t *written)
{
	uint64_t word;

	if (!has_used(d))
		return false;
	if (!d->packed) {
		const uint32_t *element = guest_at(d->guest, d->used + 4 + 8 * (d->last_used % DRIVER_QUEUE_SIZE));
		uint32_t head = load_relaxed(&element[0]);

		CHECK(head % DRIVER_PIECES == 0);
		*tag = head / DRIVER_PIECES;
		*written = load_relaxed(&element[1]);
		d->last_used++;
		CHECK(*tag < DRIVER_TAGS && d->slots[*tag]);
		d->slots[*tag] = 0;
		return true;
	}
	word = load_relaxed(&desc_at(d, d->last_used)[1]);
	*tag = word >> 32 & 0xffff;
	*written = word >> 48 & VRING_DESC_F_WRITE ? (uint32_t)word : 0;
	CHECK(*tag < DRIVER_TAGS && d->slots[*tag]);
	d->last_used = (uint16_t)(d->last_used + d->slots[*tag]);
	if (d->last_used >= DRIVER_QUEUE_SIZE) {
		d->last_used = (uint16_t)(d->last_used - DRIVER_QUEUE_SIZE);
		d->used_wrap = !d->used_wrap;
	}
	d->slots_free += d->slots[*tag];
	d->slots[*tag] = 0;
	return true;
}

bool driver_wait_begin(struct driver *d)
{
	if (d->packed)
		store_relaxed((uint32_t *)guest_at(d->guest, d->avail),
			      d->event_idx ? d->last_used | (uint32_t)d->used_wrap << 15 | EVENT_DESC << 16 : 0);
	else if (d->event_idx)
		store_relaxed(word16(d, d->avail + 4 + 2 * DRIVER_QUEUE_SIZE), d->last_used);
	else
		store_relaxed(word16(d, d->avail), 0);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return has_used(d);
}

void driver_wait_end(struct driver *d)
{
	if (d->packed)
		store_relaxed((uint32_t *)guest_at(d->guest, d->avail), EVENT_DISABLE << 16);
	else if (!d->event_idx)
		store_relaxed(word16(d, d->avail), 1);
}

/* ---- a host without memory ---- */

__thread unsigned int malloc_fails;

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);

void *__wrap_malloc(size_t size)
{
	if (!malloc_fails)
		return __real_malloc(size);
	malloc_fails--;
	return NULL;
}

/* ---- a kernel that takes no submissions ---- */

int submissions_fail;
uint32_t submissions_failed;

struct io_uring;
struct io_uring_cqe;
struct __kernel_timespec;

static bool refused(void)
{
	if (!load_relaxed(&submissions_fail))
		return false;
	__atomic_add_fetch(&submissions_failed, 1, __ATOMIC_RELAXED);
	return true;
}

int __real_io_uring_submit(struct io_uring *ring);
int __wrap_io_uring_submit(struct io_uring *ring);
int __real_io_uring_submit_and_get_events(struct io_uring *ring);
int __wrap_io_uring_submit_and_get_events(struct io_uring *ring);
int __real_io_uring_submit_and_wait(struct io_uring *ring, unsigned count);
int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned count);
int __real_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe, unsigned count,
					    struct __kernel_timespec *timeout, void *signals);
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe, unsigned count,
					    struct __kernel_timespec *timeout, void *signals);

int __wrap_io_uring_submit(struct io_uring *ring)
{
	return refused() ? -EAGAIN : __real_io_uring_submit(ring);
}

int __wrap_io_uring_submit_and_get_events(struct io_uring *ring)
{
	return refused() ? -EAGAIN : __real_io_uring_submit_and_get_events(ring);
}

int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned count)
{
	return refused() ? -EAGAIN : __real_io_uring_submit_and_wait(ring, count);
}

int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe, unsigned count,
					    struct __kernel_timespec *timeout, void *signals)
{
	return refused() ? -EAGAIN : __real_io_uring_submit_and_wait_timeout(ring, cqe, count, timeout, signals);
}
