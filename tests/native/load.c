/* Workers to command, disks to serve, and a disk driver with a shadow of what it wrote. */
#include "load.h"
#include "worker/worker.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define HEADER_AT (0x1000u - 16) /* right before the data, so that one descriptor can hold both */
#define SEGMENTS_AT 64u
#define STATUS_AT 8u
#define DATA_AT 0x1000u

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13, T_UNKNOWN = 77 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2, S_UNANSWERED = 0xaa };

/* ---- workers ---- */

void rig_open(struct rig *rig, uint32_t reactor, uint32_t poll_us)
{
	uint64_t count;
	int error;

	rig->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	CHECK(rig->done_fd >= 0);
	rig->worker = worker_new("test", reactor, poll_us, NULL, 0, rig->done_fd, &error);
	if (!rig->worker)
		fprintf(stderr, "worker_new: %s\n", strerror(-error));
	CHECK(rig->worker);
	CHECK(worker_stats(rig->worker)->reactor == reactor);
	CHECK(read(rig->done_fd, &count, sizeof(count)) == sizeof(count) || errno == EAGAIN);
}

int rig_wait(struct rig *rig, struct worker_command *command)
{
	struct pollfd wait = { .fd = rig->done_fd, .events = POLLIN };
	struct worker_command *done;
	uint64_t count;

	while (!(done = worker_take_done(rig->worker))) {
		CHECK(poll(&wait, 1, -1) == 1 || errno == EINTR);
		CHECK(read(rig->done_fd, &count, sizeof(count)) == sizeof(count) || errno == EAGAIN);
	}
	CHECK(done == command && !done->next);
	return command->result;
}

int rig_command(struct rig *rig, uint32_t op, struct virtqueue *vq, struct native_device *device,
		struct memory_table *table, int fd)
{
	struct worker_command command = { .op = op, .vq = vq, .device = device, .table = table, .fd = fd };

	worker_post(rig->worker, &command);
	return rig_wait(rig, &command);
}

void rig_close(struct rig *rig)
{
	CHECK(rig_command(rig, WORKER_QUIT, NULL, NULL, NULL, -1) == 0);
	worker_free(rig->worker);
	close(rig->done_fd);
}

/* ---- disks ---- */

const char *const disk_names[DISK_KINDS] = {
	"null", "memory", "tmpfs", "tmpfs through the reactor", "file", "file with unaligned buffers", "file with O_DIRECT",
};

struct native_device *disk_new(enum disk_kind kind, int *fd)
{
	struct blk_setup setup = { .capacity = DISK_BYTES >> 9, .fd = -1, .cached_fd = -1, .news_fd = -1,
				   .block_size = 512, .memory_align = 512, .offset_align = 512, .erase_align = 1,
				   .discard = 1, .write_zeroes = 1, .max_discard_sectors = TAG_SECTORS,
				   .max_write_zeroes_sectors = TAG_SECTORS };
	char path[] = "native-disk-XXXXXX", again[64];
	struct native_device *device;
	int error;

	memcpy(setup.serial, DISK_SERIAL, sizeof(setup.serial));
	setup.backend = kind == DISK_NULL ? BLK_BACKEND_NULL : kind == DISK_MEMORY ? BLK_BACKEND_MEMORY : BLK_BACKEND_FILE;
	setup.inline_io = kind == DISK_TMPFS;
	setup.direct = kind == DISK_BOUNCE || kind == DISK_DIRECT;
	if (kind == DISK_TMPFS || kind == DISK_TMPFS_ASYNC) {
		setup.fd = memfd_create("disk", MFD_CLOEXEC);
	} else if (setup.backend == BLK_BACKEND_FILE) {
		setup.fd = mkostemp(path, O_CLOEXEC);
		CHECK(setup.fd >= 0);
		snprintf(again, sizeof(again), "%s", path);
		if (kind == DISK_DIRECT) { /* a file system without O_DIRECT refuses; copies are then still aligned */
			int direct = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);

			if (direct >= 0) {
				close(setup.fd);
				setup.fd = direct;
			}
		}
		CHECK(unlink(again) == 0);
	}
	if (setup.fd >= 0)
		CHECK(ftruncate(setup.fd, (off_t)DISK_BYTES) == 0);
	device = blk_new(&setup, &error);
	CHECK(device && error == 0);
	*fd = setup.fd;
	return device;
}

/* ---- the driver's thread ---- */

int load_call_fd(struct load *l)
{
	struct epoll_event event = { .events = EPOLLIN };
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), given = dup(fd);

	CHECK(fd >= 0 && given >= 0 && l->call_fd_count < ARRAY_SIZE(l->call_fds));
	l->call_fds[l->call_fd_count++] = event.data.fd = fd;
	CHECK(epoll_ctl(l->wait_fd, EPOLL_CTL_ADD, fd, &event) == 0);
	return given;
}

void load_open(struct load *l, struct guest *g, uint32_t queue, bool packed, bool event_idx, enum disk_kind kind)
{
	uint64_t area = GUEST_GPA + (uint64_t)queue * QUEUE_AREA;

	memset(l, 0, sizeof(*l));
	driver_init(&l->driver, g, area, packed, event_idx);
	l->data_gpa = area + DRIVER_AREA;
	l->queue = queue % LOAD_QUEUES; /* more than these can only read */
	l->verify = kind != DISK_NULL;
	l->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	l->wait_fd = epoll_create1(EPOLL_CLOEXEC);
	l->random = 88172645463325252ull + queue;
	l->shadow = calloc(DRIVER_TAGS, TAG_BYTES);
	CHECK(l->kick_fd >= 0 && l->wait_fd >= 0 && l->shadow);
}

void load_close(struct load *l)
{
	close(l->kick_fd);
	while (l->call_fd_count)
		close(l->call_fds[--l->call_fd_count]);
	close(l->wait_fd);
	free(l->shadow);
}

void load_connect(struct load *l, struct virtqueue *vq)
{
	CHECK(virtqueue_set_doorbell(vq, DOORBELL_KICK, dup(l->kick_fd)) == 0);
	CHECK(virtqueue_set_call(vq, load_call_fd(l)) == 0);
}

/* Split `len` bytes at gpa into 1 to 4 pieces; returns how many. */
static uint32_t cut(struct load *l, struct piece *to, uint64_t gpa, uint32_t len, bool write)
{
	uint32_t wanted = 1 + random_next(&l->random) % 4, count = 0;

	while (len) {
		uint32_t n = ++count == wanted ? len : 1 + random_next(&l->random) % len;

		*to++ = (struct piece){ gpa, n, write };
		gpa += n;
		len -= n;
	}
	return count;
}

static void segments_make(struct load *l, struct expectation *e, uint32_t tag, uint8_t *at, uint64_t first_sector)
{
	uint32_t count = 1 + random_next(&l->random) % 3;

	e->length = count * 16;
	for (uint32_t i = 0; i < count; i++) {
		struct blk_segment s = { .sectors = random_next(&l->random) % (TAG_SECTORS / 4),
					 .flags = e->type == T_WRITE_ZEROES ? random_next(&l->random) % 2 : 0 };
		uint32_t skip = random_next(&l->random) % (TAG_SECTORS / 2);

		s.sector = first_sector + skip;
		memcpy(at + 16 * i, &s, 16);
		memset(l->shadow + tag * TAG_BYTES + (skip << 9), 0, s.sectors << 9);
	}
}

static uint32_t type_pick(struct load *l)
{
	uint32_t dice = random_next(&l->random) % 100;

	if (l->reads_only)
		return T_IN;
	return dice < 45 ? T_OUT : dice < 82 ? T_IN : dice < 86 ? T_FLUSH : dice < 90 ? T_DISCARD :
	       dice < 94 ? T_WRITE_ZEROES : dice < 97 ? T_GET_ID : T_UNKNOWN;
}

void load_submit(struct load *l, uint32_t tag)
{
	struct expectation *e = &l->expect[tag];
	struct piece pieces[DRIVER_PIECES];
	uint64_t gpa = l->data_gpa + tag * TAG_AREA, first = ((uint64_t)l->queue * DRIVER_TAGS + tag) * TAG_SECTORS;
	uint8_t *at = guest_at(l->driver.guest, gpa);
	struct { uint32_t type, reserved; uint64_t sector; } header = { 0 };
	uint64_t status_gpa = gpa + STATUS_AT;
	uint32_t count = 0, sectors = 1 + random_next(&l->random) % (random_next(&l->random) % 4 ? 8 : TAG_SECTORS);
	bool out_of_range = random_next(&l->random) % 50 == 0;

	*e = (struct expectation){ .type = type_pick(l), .written = 1, .status = S_OK };
	header.type = e->type;
	header.sector = first;
	pieces[count++] = (struct piece){ gpa + HEADER_AT, 16, false };
	switch (e->type) {
	case T_OUT:
	case T_IN:
		e->length = sectors << 9;
		e->offset = (random_next(&l->random) % (TAG_SECTORS - sectors + 1)) << 9;
		header.sector += e->offset >> 9;
		if (out_of_range) {
			header.sector = (DISK_BYTES >> 9) - sectors + 1;
			e->status = S_IOERR;
		}
		if (e->type == T_IN) {
			memset(at + DATA_AT, 0x5a, e->length);
			if (e->status == S_OK)
				e->written += e->length;
		} else {
			for (uint32_t i = 0; i < e->length; i += 4) {
				uint32_t word = random_next(&l->random);

				memcpy(at + DATA_AT + i, &word, 4);
			}
			if (e->status == S_OK)
				memcpy(l->shadow + tag * TAG_BYTES + e->offset, at + DATA_AT, e->length);
		}
		count += cut(l, pieces + count, gpa + DATA_AT, e->length, e->type == T_IN);
		if (e->type == T_IN && random_next(&l->random) % 4 == 0) {
			pieces[count - 1].len++; /* the status byte shares the last data descriptor */
			status_gpa = 0;
			e->status_at = at + DATA_AT + e->length;
		} else if (e->type == T_OUT && random_next(&l->random) % 4 == 0) {
			pieces[1].gpa -= 16; /* the header shares the first one */
			pieces[1].len += 16;
			memmove(pieces, pieces + 1, --count * sizeof(pieces[0]));
		}
		break;
	case T_DISCARD:
	case T_WRITE_ZEROES:
		segments_make(l, e, tag, at + SEGMENTS_AT, first);
		pieces[count++] = (struct piece){ gpa + SEGMENTS_AT, e->length, false };
		break;
	case T_GET_ID:
		e->length = 20;
		e->written += 20;
		pieces[count++] = (struct piece){ gpa + DATA_AT, 20, true };
		break;
	case T_UNKNOWN:
		e->status = S_UNSUPP;
		break;
	}
	if (status_gpa) {
		e->status_at = at + STATUS_AT;
		pieces[count++] = (struct piece){ status_gpa, 1, true };
	}
	*e->status_at = S_UNANSWERED;
	memcpy(at + HEADER_AT, &header, sizeof(header));
	driver_add(&l->driver, tag, pieces, count, l->reads_only || random_next(&l->random) % 2);
	l->in_flight++;
	l->submitted++;
}

static void complete(struct load *l, uint32_t tag, uint32_t written)
{
	const struct expectation *e = &l->expect[tag];
	const uint8_t *data = (uint8_t *)guest_at(l->driver.guest, l->data_gpa + tag * TAG_AREA) + DATA_AT;

	if (*e->status_at != e->status || written != e->written)
		fprintf(stderr, "queue %u tag %u type %u offset %u length %u: status %u for %u, written %u for %u\n", l->queue,
			tag, e->type, e->offset, e->length, *e->status_at, e->status, written, e->written);
	CHECK(*e->status_at == e->status);
	CHECK(written == e->written);
	if (e->status == S_OK && e->type == T_IN && l->verify)
		CHECK(memcmp(data, l->shadow + tag * TAG_BYTES + e->offset, e->length) == 0);
	if (e->type == T_GET_ID)
		CHECK(memcmp(data, DISK_SERIAL, 20) == 0);
	l->in_flight--;
	__atomic_add_fetch(&l->completed, 1, __ATOMIC_RELEASE);
}

static void sleep_until_called(struct load *l)
{
	struct epoll_event events[16];
	uint64_t count;
	int n;

	if (l->polls) {
		sched_yield();
		return;
	}
	if (!driver_wait_begin(&l->driver)) {
		n = epoll_wait(l->wait_fd, events, ARRAY_SIZE(events), -1);
		CHECK(n > 0 || errno == EINTR);
		for (int i = 0; i < n; i++)
			CHECK(read(events[i].data.fd, &count, sizeof(count)) == sizeof(count));
	}
	driver_wait_end(&l->driver);
}

bool load_collect(struct load *l)
{
	uint32_t tag, written;
	bool any = false;

	for (; driver_used(&l->driver, &tag, &written); any = true)
		complete(l, tag, written);
	return any;
}

void load_run(struct load *l, uint64_t requests)
{
	uint64_t one = 1, end = l->submitted + requests;

	while (l->in_flight || (l->submitted < end && !load_acquire(&l->stop))) {
		uint32_t batch = 1 + random_next(&l->random) % DRIVER_TAGS;
		bool any = false;

		for (uint32_t tag = 0; tag < DRIVER_TAGS && batch && l->submitted < end && !load_acquire(&l->stop); tag++) {
			if (l->driver.slots[tag])
				continue;
			load_submit(l, tag);
			batch--;
			any = true;
		}
		if (any && driver_needs_kick(&l->driver))
			CHECK(write(l->kick_fd, &one, sizeof(one)) == sizeof(one));
		if (!load_collect(l) && l->in_flight)
			sleep_until_called(l);
	}
}

void *load_thread(void *load)
{
	struct load *l = load;

	load_run(l, UINT64_MAX / 2);
	store_release(&l->finished, 1);
	return NULL;
}

void load_stop(struct load *l)
{
	store_release(&l->stop, 1);
}

void load_wait_progress(struct load *l, uint64_t more)
{
	uint64_t until = load_acquire(&l->completed) + more;

	while (load_acquire(&l->completed) < until)
		sched_yield();
}
