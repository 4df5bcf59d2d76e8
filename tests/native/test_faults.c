/*
 * One queue's misfortune is its own: memory that goes away, call fds that nobody empties, requests without a shape,
 * images cut short. Each time the queue beside it, on the same worker, goes on with every byte right, and the queue
 * that suffered can still be taken away.
 */
#include "load.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define EVENTFD_FULL 0xfffffffffffffffeull
/* A place in the ring's own area that neither ring nor tables use: what lies here outlives a cut of the rest. */
#define HEADER_GPA (GUEST_GPA + DRIVER_AREA / 2 + 0x2000)
#define STATUS_GPA (HEADER_GPA + 64)

struct bed {
	struct rig rig;
	struct native_device *disk;
	int disk_fd, event_fd;
	struct guest *guest, *neighbour_guest; /* each its own memory file */
	struct load load, neighbour;
	struct virtqueue *vq, *neighbour_vq;
	pthread_t thread;
};

static struct virtqueue *queue_open(struct bed *b, struct load *l, struct guest *g, uint32_t index)
{
	struct queue_setup setup = driver_setup(&l->driver);
	struct virtqueue *vq = virtqueue_new(index, b->event_fd);

	CHECK(vq && virtqueue_configure(vq, &setup, g->table, NULL) == 0);
	load_connect(l, vq);
	return vq;
}

static void bed_open(struct bed *b, uint32_t reactor, enum disk_kind kind, bool packed, bool own_base)
{
	memset(b, 0, sizeof(*b));
	b->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	rig_open(&b->rig, reactor, 20);
	b->disk = disk_new(kind, &b->disk_fd);
	b->guest = guest_new(GUEST_BYTES, own_base);
	b->neighbour_guest = guest_new(GUEST_BYTES, false);
	load_open(&b->load, b->guest, 0, packed, true, kind);
	load_open(&b->neighbour, b->neighbour_guest, 1, !packed, true, kind);
	b->vq = queue_open(b, &b->load, b->guest, 0);
	b->neighbour_vq = queue_open(b, &b->neighbour, b->neighbour_guest, 1);
	CHECK(rig_command(&b->rig, WORKER_ATTACH, b->vq, b->disk, NULL, -1) == 0);
	CHECK(rig_command(&b->rig, WORKER_ATTACH, b->neighbour_vq, b->disk, NULL, -1) == 0);
	CHECK(pthread_create(&b->thread, NULL, load_thread, &b->neighbour) == 0);
	load_run(&b->load, 100);
}

static void bed_close(struct bed *b)
{
	struct queue_report report;

	load_wait_progress(&b->neighbour, 100); /* it never noticed */
	load_stop(&b->neighbour);
	pthread_join(b->thread, NULL);
	virtqueue_report(b->neighbour_vq, &report);
	CHECK(report.fault == VQ_FAULT_NONE);
	CHECK(rig_command(&b->rig, WORKER_DETACH, b->vq, NULL, NULL, -1) == 0);
	CHECK(rig_command(&b->rig, WORKER_DETACH, b->neighbour_vq, NULL, NULL, -1) == 0);
	CHECK(virtqueue_stats(b->vq)->inflight == 0);
	virtqueue_free(b->vq);
	virtqueue_free(b->neighbour_vq);
	rig_close(&b->rig);
	native_device_unref(b->disk);
	load_close(&b->load);
	load_close(&b->neighbour);
	guest_free(b->guest);
	guest_free(b->neighbour_guest);
	close(b->event_fd);
	if (b->disk_fd >= 0)
		close(b->disk_fd);
}

static void kick(const struct load *l)
{
	uint64_t one = 1;

	CHECK(write(l->kick_fd, &one, sizeof(one)) == sizeof(one));
}

static void await_fault(struct bed *b, uint32_t fault)
{
	struct queue_report report;

	do {
		sched_yield();
		virtqueue_report(b->vq, &report);
	} while (!report.fault);
	if (report.fault != fault)
		fprintf(stderr, "broke with %u, not %u\n", report.fault, fault);
	CHECK(report.fault == fault);
}

/* A read whose header and status lie in the ring's own area, into `len` bytes at `gpa`. */
static void add_read(struct bed *b, uint64_t gpa, uint32_t len, uint64_t sector)
{
	struct { uint32_t type, reserved; uint64_t sector; } header = { .sector = sector };
	const struct piece pieces[] = { { HEADER_GPA, 16, false }, { gpa, len, true }, { STATUS_GPA, 1, true } };

	memcpy(guest_at(b->guest, HEADER_GPA), &header, sizeof(header));
	*(uint8_t *)guest_at(b->guest, STATUS_GPA) = 0xaa;
	driver_add(&b->load.driver, 0, pieces, ARRAY_SIZE(pieces), false);
	kick(&b->load);
}

static uint8_t await_status(struct bed *b)
{
	uint32_t tag, written;

	while (!driver_used(&b->load.driver, &tag, &written))
		sched_yield();
	CHECK(tag == 0);
	return *(uint8_t *)guest_at(b->guest, STATUS_GPA);
}

/* ---- memory ---- */

static void test_queue_breaks_when_its_ring_memory_is_cut_off(uint32_t reactor, bool packed)
{
	struct bed b;

	bed_open(&b, reactor, DISK_MEMORY, packed, true);
	CHECK(ftruncate(b.guest->fd, 0) == 0);
	kick(&b.load);
	await_fault(&b, VQ_FAULT_MEMORY_GONE);
	CHECK(mapping_dead(b.guest->mapping) && !mapping_dead(b.neighbour_guest->mapping));
	bed_close(&b);
}

static void test_queue_breaks_when_a_buffer_copied_by_hand_is_cut_off(uint32_t reactor, bool packed)
{
	struct bed b;

	bed_open(&b, reactor, DISK_MEMORY, packed, true);
	CHECK(ftruncate(b.guest->fd, DRIVER_AREA) == 0);
	add_read(&b, GUEST_GPA + 2 * DRIVER_AREA, 8192, 0);
	await_fault(&b, VQ_FAULT_MEMORY_GONE);
	bed_close(&b);
}

static void test_only_the_request_fails_when_the_kernel_meets_the_cut_off_buffer(uint32_t reactor, enum disk_kind kind)
{
	struct queue_report report;
	struct bed b;

	bed_open(&b, reactor, kind, false, true);
	CHECK(ftruncate(b.guest->fd, DRIVER_AREA) == 0);
	add_read(&b, GUEST_GPA + 2 * DRIVER_AREA, 8192, 0);
	CHECK(await_status(&b) == 1); /* VIRTIO_BLK_S_IOERR */
	add_read(&b, HEADER_GPA + 1024, 512, 0);
	CHECK(await_status(&b) == 0);
	virtqueue_report(b.vq, &report);
	CHECK(report.fault == VQ_FAULT_NONE && !mapping_dead(b.guest->mapping));
	bed_close(&b);
}

static uint8_t *unguarded;
static volatile sig_atomic_t faults_of_others;

static void earlier_handler(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	CHECK(info->si_addr == unguarded);
	CHECK(mmap(unguarded, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == unguarded);
	faults_of_others++;
}

static void test_a_fault_elsewhere_goes_to_the_handler_that_was_there_before(void)
{
	int fd = memfd_create("elsewhere", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, 4096) == 0);
	unguarded = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(unguarded != MAP_FAILED && ftruncate(fd, 0) == 0);
	*(volatile uint8_t *)unguarded = 1;
	CHECK(faults_of_others == 1);
	munmap(unguarded, 4096);
	close(fd);
}

static void test_a_fault_elsewhere_still_ends_the_process_when_nobody_was_there_before(void)
{
	struct sigaction none = { .sa_handler = SIG_DFL };
	int status;
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		int fd = memfd_create("elsewhere", 0);
		volatile uint8_t *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

		sigaction(SIGBUS, &none, NULL);
		CHECK(sigbus_install() == 0);
		*p = 1; /* beyond the end of an empty file */
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

/* ---- notifications ---- */

static int eventfd_with(uint64_t count, int flags)
{
	int fd = eventfd(0, EFD_CLOEXEC | flags);

	CHECK(fd >= 0 && write(fd, &count, sizeof(count)) == sizeof(count));
	return fd;
}

static void test_a_full_blocking_call_fd_is_refused_and_the_queue_keeps_its_own(uint32_t reactor)
{
	int full = eventfd_with(EVENTFD_FULL, 0);
	struct bed b;

	bed_open(&b, reactor, DISK_MEMORY, false, false);
	CHECK(rig_command(&b.rig, WORKER_SET_CALL, b.vq, NULL, NULL, full) == DP_E_KEPT_FULL);
	CHECK(close(full) == 0);
	CHECK(driver_wait_begin(&b.load.driver) == false);
	add_read(&b, HEADER_GPA + 1024, 512, 0);
	CHECK(await_status(&b) == 0);
	bed_close(&b);
}

static void test_a_call_fd_that_fills_up_breaks_its_queue_with_the_next_notification(uint32_t reactor)
{
	struct bed b;

	bed_open(&b, reactor, DISK_MEMORY, false, false);
	CHECK(rig_command(&b.rig, WORKER_SET_CALL, b.vq, NULL, NULL, eventfd_with(EVENTFD_FULL - 1, 0)) == 0);
	CHECK(driver_wait_begin(&b.load.driver) == false);
	add_read(&b, HEADER_GPA + 1024, 512, 0);
	CHECK(await_status(&b) == 0); /* published before it was notified */
	await_fault(&b, VQ_FAULT_CALL_FD);
	bed_close(&b);
}

static void test_a_full_call_fd_that_does_not_block_is_harmless(uint32_t reactor)
{
	struct queue_report report;
	struct bed b;

	bed_open(&b, reactor, DISK_MEMORY, false, false);
	CHECK(rig_command(&b.rig, WORKER_SET_CALL, b.vq, NULL, NULL, eventfd_with(EVENTFD_FULL, EFD_NONBLOCK)) == 0);
	for (int i = 0; i < 20; i++) {
		driver_wait_begin(&b.load.driver);
		add_read(&b, HEADER_GPA + 1024, 512, 0);
		CHECK(await_status(&b) == 0);
	}
	virtqueue_report(b.vq, &report);
	CHECK(report.fault == VQ_FAULT_NONE);
	bed_close(&b);
}

static void test_a_full_blocking_err_fd_does_not_hold_the_worker(uint32_t reactor)
{
	const struct piece half[] = { { HEADER_GPA, 8, false } };
	struct bed b;

	bed_open(&b, reactor, DISK_MEMORY, false, false);
	CHECK(rig_command(&b.rig, WORKER_SET_ERR, b.vq, NULL, NULL, eventfd_with(EVENTFD_FULL, 0)) == 0);
	driver_add(&b.load.driver, 0, half, 1, false);
	kick(&b.load);
	await_fault(&b, VQ_FAULT_SHAPE);
	bed_close(&b);
}

static void test_what_cannot_notify_stays_with_whoever_gave_it(uint32_t reactor)
{
	int fds[2];
	struct bed b;

	bed_open(&b, reactor, DISK_MEMORY, false, false);
	CHECK(pipe(fds) == 0);
	CHECK(rig_command(&b.rig, WORKER_SET_CALL, b.vq, NULL, NULL, fds[0]) == DP_E_NOT_NOTIFIER);
	CHECK(rig_command(&b.rig, WORKER_SET_ERR, b.vq, NULL, NULL, fds[0]) == DP_E_NOT_NOTIFIER);
	CHECK(virtqueue_set_doorbell(b.vq, DOORBELL_KICK, b.disk_fd >= 0 ? b.disk_fd : fds[0]) == DP_E_NOT_EVENTFD);
	CHECK(close(fds[0]) == 0 && close(fds[1]) == 0);
	load_run(&b.load, 20); /* and the call fd that was there still works */
	bed_close(&b);
}

/* Neither the queue nor its worker is held, and the peer that has gone is no fault of the driver's. */
static void test_a_call_pipe_that_is_full_or_has_no_reader_harms_nobody(uint32_t reactor)
{
	uint64_t one = 0;
	struct bed b;
	int fds[2];

	bed_open(&b, reactor, DISK_MEMORY, false, false);
	CHECK(pipe(fds) == 0);
	CHECK(rig_command(&b.rig, WORKER_SET_CALL, b.vq, NULL, NULL, dup(fds[1])) == 0);
	CHECK(read(fds[0], &one, sizeof(one)) == sizeof(one) && one == 1);
	CHECK(fcntl(fds[1], F_SETPIPE_SZ, 4096) >= 4096);
	for (int i = 0; i < 2000; i++) /* more than fits in */
		CHECK(rig_command(&b.rig, WORKER_SET_CALL, b.vq, NULL, NULL, dup(fds[1])) == 0);
	CHECK(close(fds[0]) == 0);
	CHECK(rig_command(&b.rig, WORKER_SET_CALL, b.vq, NULL, NULL, fds[1]) == 0);
	CHECK(rig_command(&b.rig, WORKER_SET_CALL, b.vq, NULL, NULL, load_call_fd(&b.load)) == 0);
	load_run(&b.load, 20);
	CHECK(virtqueue_stats(b.vq)->notifications_lost == 1);
	bed_close(&b);
}

static void test_a_kick_fd_that_never_runs_dry_does_not_hold_the_worker(uint32_t reactor)
{
	struct bed b;
	int fd;

	bed_open(&b, reactor, DISK_MEMORY, false, false);
	CHECK(rig_command(&b.rig, WORKER_DETACH, b.vq, NULL, NULL, -1) == 0);
	fd = eventfd_with(1u << 31, EFD_SEMAPHORE); /* two thousand million kicks, read one by one; and it blocks */
	CHECK(virtqueue_set_doorbell(b.vq, DOORBELL_KICK, dup(fd)) == 0);
	CHECK(rig_command(&b.rig, WORKER_ATTACH, b.vq, b.disk, NULL, -1) == 0);
	b.load.polls = true;
	load_run(&b.load, 200);
	load_wait_progress(&b.neighbour, 200);
	close(fd);
	bed_close(&b);
}

/* ---- requests ---- */

static void test_a_broken_queue_can_be_detached_with_its_bad_request_in_hand(uint32_t reactor, bool packed)
{
	const struct piece half[] = { { HEADER_GPA, 8, false } };
	struct bed b;

	bed_open(&b, reactor, DISK_MEMORY, packed, false);
	driver_add(&b.load.driver, 0, half, 1, false);
	kick(&b.load);
	await_fault(&b, VQ_FAULT_SHAPE);
	bed_close(&b); /* detaches */
}

static void test_a_queue_broken_under_io_detaches_when_its_io_is_over(uint32_t reactor, enum disk_kind kind)
{
	const struct piece half[] = { { HEADER_GPA, 8, false } };
	struct bed b;

	bed_open(&b, reactor, kind, false, false);
	for (uint32_t tag = 1; tag < DRIVER_TAGS; tag++)
		load_submit(&b.load, tag);
	driver_add(&b.load.driver, 0, half, 1, false);
	kick(&b.load);
	await_fault(&b, VQ_FAULT_SHAPE);
	bed_close(&b);
}

static void test_an_image_cut_short_answers_io_errors(uint32_t reactor, enum disk_kind kind)
{
	struct bed b;

	bed_open(&b, reactor, kind, false, false);
	load_stop(&b.neighbour); /* it reads what is about to go */
	pthread_join(b.thread, NULL);
	CHECK(ftruncate(b.disk_fd, 4096 + 512) == 0);
	add_read(&b, HEADER_GPA + 1024, 1024, 8); /* the first half is still there */
	CHECK(await_status(&b) == 1);
	add_read(&b, HEADER_GPA + 1024, 512, 1000);
	CHECK(await_status(&b) == 1);
	add_read(&b, HEADER_GPA + 1024, 512, 8);
	CHECK(await_status(&b) == 0);
	CHECK(ftruncate(b.disk_fd, (off_t)DISK_BYTES) == 0);
	memset(b.neighbour.shadow, 0, DRIVER_TAGS * TAG_BYTES);
	store_release(&b.neighbour.stop, 0);
	CHECK(pthread_create(&b.thread, NULL, load_thread, &b.neighbour) == 0);
	bed_close(&b);
}

static void run(uint32_t reactor)
{
	for (int packed = 0; packed < 2; packed++) {
		test_queue_breaks_when_its_ring_memory_is_cut_off(reactor, packed);
		test_queue_breaks_when_a_buffer_copied_by_hand_is_cut_off(reactor, packed);
		test_a_broken_queue_can_be_detached_with_its_bad_request_in_hand(reactor, packed);
	}
	for (enum disk_kind kind = DISK_TMPFS; kind <= DISK_FILE; kind++) {
		test_only_the_request_fails_when_the_kernel_meets_the_cut_off_buffer(reactor, kind);
		test_a_queue_broken_under_io_detaches_when_its_io_is_over(reactor, kind);
		test_an_image_cut_short_answers_io_errors(reactor, kind);
	}
	test_a_full_blocking_call_fd_is_refused_and_the_queue_keeps_its_own(reactor);
	test_a_call_fd_that_fills_up_breaks_its_queue_with_the_next_notification(reactor);
	test_a_full_call_fd_that_does_not_block_is_harmless(reactor);
	test_a_full_blocking_err_fd_does_not_hold_the_worker(reactor);
	test_what_cannot_notify_stays_with_whoever_gave_it(reactor);
	test_a_call_pipe_that_is_full_or_has_no_reader_harms_nobody(reactor);
	test_a_kick_fd_that_never_runs_dry_does_not_hold_the_worker(reactor);
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = earlier_handler, .sa_flags = SA_SIGINFO };

	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(100);
	CHECK(sigaction(SIGBUS, &action, NULL) == 0);
	CHECK(sigbus_install() == 0 && sigbus_install() == 0); /* the second time it finds itself */
	test_a_fault_elsewhere_still_ends_the_process_when_nobody_was_there_before();
	test_a_fault_elsewhere_goes_to_the_handler_that_was_there_before();
	run(REACTOR_IO_URING);
	printf("io_uring: ok\n");
	run(REACTOR_EPOLL);
	printf("epoll: ok\n");
	return 0;
}
