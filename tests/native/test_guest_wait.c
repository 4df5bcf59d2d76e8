/*
 * How long the guest waits, beside how long its device takes: the worker goes round by hand on this thread, and devices
 * let the clock run on, so every bound is one of cause and effect.
 */
#include "load.h"
#include "net/net.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define QUEUES 2 /* the worker looks at the first one first */
#define LONG_NS 4000000u
#define FRAME_BYTES 128u

struct slow { /* a device that takes its time; the requests that it keeps are its test's to finish */
	struct native_device native;
	struct table *table;
	uint64_t takes_ns;
	uint32_t brings; /* so many requests reach the other queue while it is busy with its first one */
	bool keeps, in_parts;
	struct request *kept[DRIVER_TAGS];
	uint32_t kept_count;
};

struct table {
	struct guest *guest;
	struct worker worker;
	struct virtqueue *queues[QUEUES];
	struct driver drivers[QUEUES];
	struct slow slow[QUEUES];
};

static void pass(uint64_t ns)
{
	uint64_t until = now_ns() + ns;

	while (now_ns() < until)
		;
}

static uint64_t area(uint32_t queue)
{
	return GUEST_GPA + queue * 2 * (uint64_t)DRIVER_AREA;
}

static void ask(struct table *t, uint32_t queue, uint32_t first, uint32_t count)
{
	for (uint32_t tag = first; tag < first + count; tag++) {
		struct piece piece = { area(queue) + DRIVER_AREA + tag * FRAME_BYTES, FRAME_BYTES, false };

		driver_add(&t->drivers[queue], tag, &piece, 1, false);
	}
}

static uint32_t collect(struct table *t, uint32_t queue)
{
	uint32_t tag, written, count = 0;

	while (driver_used(&t->drivers[queue], &tag, &written))
		count++;
	return count;
}

static int64_t slow_serve(struct native_device *device, struct worker *w, struct virtqueue *vq,
			  struct chain_view *chain, uint64_t start_ns)
{
	struct slow *slow = (struct slow *)device;

	if (slow->in_parts) {
		vq->unfinished = request_start(w, vq, device, chain, start_ns);
		vq->unfinished->op = 0;
		return SERVE_ASYNC;
	}
	if (slow->keeps) {
		struct request *r = request_start(w, vq, device, chain, start_ns);

		r->op = 0;
		slow->kept[slow->kept_count++] = r;
		return SERVE_ASYNC;
	}
	ask(slow->table, 1, 0, slow->brings);
	slow->brings = 0;
	pass(slow->takes_ns);
	op_stats_add(&vq->stats.ops[0], now_ns() - start_ns, 0, false);
	return 0;
}

static bool slow_proceed(struct request *r)
{
	struct slow *slow = (struct slow *)r->device;

	slow->in_parts = false;
	pass(slow->takes_ns);
	request_finish(r, 0, false);
	return true;
}

static void slow_free(struct native_device *device)
{
	(void)device;
}

static const struct native_ops slow_ops = { .serve = slow_serve, .proceed = slow_proceed, .free = slow_free };

static int add_doorbell(struct worker *w, struct virtqueue *vq, uint32_t kind)
{
	(void)w, (void)vq, (void)kind;
	return 0;
}

static bool no_turn(struct worker *w, uint64_t timeout_ns)
{
	(void)w, (void)timeout_ns;
	return false;
}

static const struct reactor_ops by_hand = {
	.add_doorbell = add_doorbell,
	.remove_doorbell = worker_doorbell_removed,
	.turn = no_turn,
};

static void command(struct table *t, uint32_t op, uint32_t queue, struct native_device *device)
{
	struct worker_command c = { .op = op, .vq = t->queues[queue], .device = device, .fd = -1 };
	uint32_t rounds = 0;

	worker_post(&t->worker, &c);
	while (!worker_take_done(&t->worker)) {
		worker_round(&t->worker);
		CHECK(++rounds < 1000);
	}
	CHECK(c.result == 0);
}

static void table_open(struct table *t, bool packed)
{
	memset(t, 0, sizeof(*t));
	t->guest = guest_new(QUEUES * 2 * (uint64_t)DRIVER_AREA, false);
	t->worker.reactor = &by_hand;
	t->worker.turn_ns = UINT64_MAX;
	t->worker.wake_fd = t->worker.done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	/* A worker looks at the queue first that it was given last. */
	for (uint32_t i = QUEUES; i--;) {
		struct queue_setup ring;

		t->slow[i] = (struct slow){ .native = { .ops = &slow_ops, .refs = 1 }, .table = t };
		driver_init(&t->drivers[i], t->guest, area(i), packed, false);
		ring = driver_setup(&t->drivers[i]);
		t->queues[i] = virtqueue_new(i, t->worker.done_fd);
		CHECK(virtqueue_configure(t->queues[i], &ring, t->guest->table, NULL) == 0);
		command(t, WORKER_ATTACH, i, &t->slow[i].native);
	}
}

static void table_close(struct table *t)
{
	for (uint32_t i = 0; i < QUEUES; i++) {
		command(t, WORKER_DETACH, i, NULL);
		virtqueue_free(t->queues[i]);
	}
	close(t->worker.done_fd);
	guest_free(t->guest);
}

static const struct queue_stats *stats(struct table *t, uint32_t queue)
{
	return virtqueue_stats(t->queues[queue]);
}

static uint64_t felt_ns(struct table *t, uint32_t queue)
{
	return load_relaxed(&stats(t, queue)->guest_sum_ns);
}

static uint64_t taken_ns(struct table *t, uint32_t queue)
{
	return load_relaxed(&stats(t, queue)->ops[0].duration_sum_ns);
}

/* How many of the queue's requests are in the bucket of `ns` or in a higher one. */
static uint64_t felt_above(struct table *t, uint32_t queue, uint64_t ns)
{
	uint64_t count = 0;

	for (unsigned bucket = histogram_bucket(ns); bucket < DP_HISTOGRAM_BUCKETS; bucket++)
		count += load_relaxed(&stats(t, queue)->guest_buckets[bucket]);
	return count;
}

static void test_a_request_that_comes_while_the_worker_is_busy_waits_from_then_on(bool packed)
{
	struct table t;

	table_open(&t, packed);
	worker_round(&t.worker);
	t.slow[0].takes_ns = LONG_NS;
	t.slow[0].brings = 3;
	ask(&t, 0, 0, 1);
	worker_round(&t.worker);
	CHECK(collect(&t, 0) == 1 && collect(&t, 1) == 3);
	CHECK(felt_above(&t, 1, LONG_NS) == 3);
	CHECK(felt_ns(&t, 1) >= 3ull * LONG_NS + taken_ns(&t, 1));
	table_close(&t);
}

static void test_a_queue_that_was_idle_counts_nothing_of_that(bool packed)
{
	struct table t;
	uint64_t before;

	table_open(&t, packed);
	worker_round(&t.worker);
	pass(LONG_NS);
	before = now_ns();
	worker_round(&t.worker); /* the last look that finds nothing */
	ask(&t, 0, 0, 1);
	worker_round(&t.worker);
	CHECK(felt_above(&t, 0, 0) == 1);
	CHECK(felt_ns(&t, 0) <= now_ns() - before);
	table_close(&t);
}

static void test_what_a_turn_leaves_waits_on_until_it_is_done(bool packed)
{
	const uint64_t each = LONG_NS / 20, count = 20;
	struct table t;
	uint64_t before, earlier;

	table_open(&t, packed);
	t.worker.turn_ns = 0; /* a request a turn */
	t.slow[0].takes_ns = each;
	before = now_ns();
	worker_round(&t.worker);
	ask(&t, 0, 0, (uint32_t)count);
	for (uint32_t i = 0; i < count; i++)
		worker_round(&t.worker);
	CHECK(collect(&t, 0) == count && felt_above(&t, 0, 0) == count);
	CHECK(felt_ns(&t, 0) >= count * (count + 1) / 2 * each);
	CHECK(felt_ns(&t, 0) <= count * (now_ns() - before));
	CHECK(taken_ns(&t, 0) < felt_ns(&t, 0));
	/* And then nothing of it is left: the next one counts from its own time. */
	worker_round(&t.worker);
	pass(LONG_NS);
	before = now_ns();
	worker_round(&t.worker);
	earlier = felt_ns(&t, 0);
	ask(&t, 0, 0, 1);
	worker_round(&t.worker);
	CHECK(felt_ns(&t, 0) - earlier <= now_ns() - before);
	table_close(&t);
}

static void finish_all(struct slow *slow)
{
	for (uint32_t i = 0; i < slow->kept_count; i++)
		request_finish(slow->kept[i], 0, false);
	slow->kept_count = 0;
}

static void test_requests_that_find_their_queue_s_share_in_use_wait_in_the_ring(bool packed)
{
	struct table t;

	table_open(&t, packed);
	t.slow[0].keeps = true;
	t.queues[0]->pool_size = 2;
	ask(&t, 0, 0, 6);
	for (uint32_t done = 0; done < 6; done += 2) {
		worker_round(&t.worker);
		CHECK(t.slow[0].kept_count == 2);
		pass(LONG_NS);
		worker_round(&t.worker);
		finish_all(&t.slow[0]);
	}
	worker_round(&t.worker);
	CHECK(collect(&t, 0) == 6);
	/* One after the other, two at a time: each took the storage as long, and the guest up to three times that. */
	CHECK(felt_ns(&t, 0) >= 2ull * (1 + 2 + 3) * LONG_NS);
	CHECK(felt_ns(&t, 0) >= taken_ns(&t, 0) + 2ull * (1 + 2) * LONG_NS);
	table_close(&t);
}

static void test_a_request_behind_a_long_one_waits_for_its_parts(bool packed)
{
	struct table t;
	uint64_t before, earlier;

	table_open(&t, packed);
	t.slow[0].in_parts = true;
	t.slow[0].takes_ns = LONG_NS;
	ask(&t, 0, 0, 1);
	worker_round(&t.worker);
	CHECK(t.queues[0]->unfinished);
	ask(&t, 0, 1, 1);
	worker_round(&t.worker);
	CHECK(!t.queues[0]->unfinished);
	t.slow[0].takes_ns = 0;
	worker_round(&t.worker);
	CHECK(collect(&t, 0) == 2 && felt_above(&t, 0, LONG_NS) == 2);
	/* The next long one has nothing behind it: what comes long after it has waited for nothing. */
	t.slow[0].in_parts = true;
	ask(&t, 0, 0, 1);
	for (int i = 0; i < 3; i++)
		worker_round(&t.worker);
	pass(LONG_NS);
	before = now_ns();
	worker_round(&t.worker);
	earlier = felt_ns(&t, 0);
	ask(&t, 0, 1, 1);
	worker_round(&t.worker);
	CHECK(felt_ns(&t, 0) - earlier <= now_ns() - before);
	CHECK(collect(&t, 0) == 2);
	table_close(&t);
}

static void test_frames_wait_until_the_turn_of_their_queue(void)
{
	struct net_setup setup = { .backend = NET_BACKEND_REFLECT, .pairs = 1, .fds = { -1 }, .mac = { 2, 0, 0, 0, 0, 1 } };
	struct table t;
	struct native_device *nic;
	struct queue_setup ring;
	int error;

	table_open(&t, false);
	nic = net_new(&setup, NULL, &error);
	CHECK(nic);
	net_set_features(nic, 1ull << VIRTIO_F_VERSION_1);
	ring = driver_setup(&t.drivers[1]);
	command(&t, WORKER_DETACH, 1, NULL);
	command(&t, WORKER_DETACH, 0, NULL);
	CHECK(virtqueue_configure(t.queues[1], &ring, t.guest->table, NULL) == 0); /* 5.1.2: 1 transmits */
	command(&t, WORKER_ATTACH, 1, nic);
	command(&t, WORKER_ATTACH, 0, &t.slow[0].native);
	worker_round(&t.worker);
	t.slow[0].takes_ns = LONG_NS;
	t.slow[0].brings = 3;
	ask(&t, 0, 0, 1);
	worker_round(&t.worker);
	CHECK(collect(&t, 1) == 3 && felt_above(&t, 1, LONG_NS) == 3);
	table_close(&t);
	native_device_unref(nic);
}

/* A worker of its own thread, that sleeps until it is kicked. */
static void test_a_sleep_is_no_wait(uint32_t reactor)
{
	struct rig rig;
	struct table t;
	uint64_t before, one = 1;
	int kick, kick_end;

	table_open(&t, false);
	command(&t, WORKER_DETACH, 0, NULL);
	kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	kick_end = dup(kick);
	CHECK(kick >= 0 && kick_end >= 0);
	CHECK(virtqueue_set_doorbell(t.queues[0], DOORBELL_KICK, kick) == 0);
	rig_open(&rig, reactor, 0);
	CHECK(rig_command(&rig, WORKER_ATTACH, t.queues[0], &t.slow[0].native, NULL, -1) == 0);
	for (uint32_t i = 0; i < 3; i++) {
		uint64_t until_now = felt_ns(&t, 0);

		while (!load_relaxed(&rig.worker->sleeping)) /* awake it would find the request itself, since its last look */
			sched_yield();
		pass(LONG_NS);
		before = now_ns();
		ask(&t, 0, 0, 1);
		CHECK(write(kick_end, &one, sizeof(one)) == sizeof(one));
		while (collect(&t, 0) == 0)
			sched_yield();
		CHECK(felt_ns(&t, 0) - until_now <= now_ns() - before);
	}
	CHECK(rig_command(&rig, WORKER_DETACH, t.queues[0], NULL, NULL, -1) == 0);
	rig_close(&rig);
	CHECK(felt_above(&t, 0, 0) == 3);
	close(kick_end);
	command(&t, WORKER_ATTACH, 0, &t.slow[0].native);
	table_close(&t);
}

int main(void)
{
	alarm(100);
	for (int packed = 0; packed < 2; packed++) {
		test_a_request_that_comes_while_the_worker_is_busy_waits_from_then_on(packed);
		test_a_queue_that_was_idle_counts_nothing_of_that(packed);
		test_what_a_turn_leaves_waits_on_until_it_is_done(packed);
		test_requests_that_find_their_queue_s_share_in_use_wait_in_the_ring(packed);
		test_a_request_behind_a_long_one_waits_for_its_parts(packed);
	}
	test_frames_wait_until_the_turn_of_their_queue();
	test_a_sleep_is_no_wait(REACTOR_IO_URING);
	test_a_sleep_is_no_wait(REACTOR_EPOLL);
	return 0;
}
