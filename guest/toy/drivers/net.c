/*
 * virtio-net (virtio 1.3, 5.1): frames go out; by the option ``net`` each comes back intact (reflect), none comes back
 * (drop), or nobody cares (none). Frames of other senders may come in between; they are counted, not checked.
 */
#include "drivers/drivers.h"
#include "start/interrupts.h"
#include "start/memory.h"
#include "start/report.h"

#define FEATURE_MAC (1ull << 5)

#define QUEUE_RECEIVE 0
#define QUEUE_TRANSMIT 1
#define SLOTS 4
#define HEADER_BYTES 12 /* 5.1.6: with VERSION_1 it always has num_buffers */
#define FRAME_MAX 1514
#define FRAME_MIN 60
#define FRAME_LARGEST 1512 /* that is sent: whole words */
#define ETHERTYPE 0xb588 /* 0x88b5 in network order: local experiments (IEEE 802) */
#define MAGIC 0x42726548
#define STEP 0x9e3779b9u
#define GRACE_TICKS 4

struct frame {
	uint8_t target[6];
	uint8_t source[6];
	uint16_t type;
	uint16_t length; /* of the frame */
	uint32_t words[(FRAME_LARGEST - 16) / 4]; /* magic, number, and what follows from it */
} __attribute__((packed, aligned(4)));

struct slot {
	uint8_t header[HEADER_BYTES];
	struct frame frame;
	uint8_t room[FRAME_MAX - FRAME_LARGEST];
	bool busy;
} __attribute__((aligned(64)));

struct net {
	struct slot receive[SLOTS];
	struct slot transmit[SLOTS];
	uint8_t mac[6];
	uint32_t next;	   /* number of the next frame out */
	uint32_t expected; /* number of the next frame in, with ``reflect`` */
	uint32_t first;	   /* number of the first frame since the last reset */
	uint32_t sent;
	uint32_t received;
	uint32_t foreign;
	uint32_t late;
	uint32_t bytes_checked;
};

static uint32_t net_queue_count(const struct device *device)
{
	(void)device;
	return 2;
}

static bool net_give_receive(struct device *device, struct slot *slot)
{
	struct queue_buffer buffer = { slot->header, HEADER_BYTES + FRAME_MAX };

	return queue_add(&device->queues[QUEUE_RECEIVE], &buffer, 0, 1, slot);
}

static int net_begin(struct device *device)
{
	struct net *net;
	uint32_t i;

	if (!device->state)
		device->state = memory_take(sizeof(*net), 64);
	net = device->state;
	net->first = net->expected = net->next; /* what was under way before a reset is not waited for */
	for (i = 0; i < 6; i++)
		net->mac[i] = device_has(device, FEATURE_MAC) ? mmio_read8(device->bus.base + DEVICE_CONFIG + i) : 0x02;
	for (i = 0; i < SLOTS; i++) {
		net->transmit[i].busy = false;
		net_give_receive(device, &net->receive[i]);
	}
	queue_publish(&device->queues[QUEUE_RECEIVE]);
	return 0;
}

/* Sizes from the smallest to the largest frame, by the frame's number. */
static uint16_t frame_length(uint32_t number)
{
	return (uint16_t)(number % 4 == 3 ? FRAME_LARGEST : FRAME_MIN + number % 4 * 320 + number % 16 * 4);
}

static uint32_t frame_words(uint32_t length)
{
	return (length - 16) / 4;
}

static void frame_fill(const struct net *net, struct frame *frame, uint32_t number)
{
	uint32_t length = frame_length(number), word, i;

	memcpy(frame->target, net->mac, 6);
	memcpy(frame->source, net->mac, 6);
	frame->type = ETHERTYPE;
	frame->length = (uint16_t)length;
	for (i = 2, word = number; i < frame_words(length); i++, word += STEP)
		frame->words[i] = word;
	frame->words[0] = MAGIC;
	frame->words[1] = number;
}

static bool net_give_transmit(struct device *device)
{
	struct net *net = device->state;
	struct queue_buffer buffer;
	struct slot *slot;

	for (slot = net->transmit; slot < net->transmit + SLOTS; slot++) {
		if (slot->busy)
			continue;
		memset(slot->header, 0, HEADER_BYTES);
		frame_fill(net, &slot->frame, net->next);
		buffer = (struct queue_buffer){ slot->header, HEADER_BYTES + (uint32_t)frame_length(net->next) };
		slot->busy = queue_add(&device->queues[QUEUE_TRANSMIT], &buffer, 1, 0, slot);
		net->next += slot->busy;
		return slot->busy;
	}
	return false;
}

static int net_check_frame(struct device *device, const struct slot *slot, uint32_t length)
{
	struct net *net = device->state;
	const struct frame *frame = &slot->frame;
	uint32_t number = frame->words[1], word, i;

	if (length < HEADER_BYTES + FRAME_MIN || length > HEADER_BYTES + FRAME_MAX)
		return report_error("%s: a frame of %u bytes with its header", device->bus.name, length);
	if (frame->type != ETHERTYPE || frame->words[0] != MAGIC) {
		net->foreign++;
		return 0;
	}
	if ((int32_t)(number - net->first) < 0) {
		net->late++; /* sent before the reset, and on its way since */
		return 0;
	}
	net->received++;
	if (options.net != NET_REFLECT)
		return options.net == NET_NONE ? 0 : report_error("%s: frame %u came back", device->bus.name, number);
	if (number != net->expected)
		return report_error("%s: frame %u came back where %u should", device->bus.name, number, net->expected);
	net->expected++;
	if (length != HEADER_BYTES + (uint32_t)frame_length(number) || frame->length != frame_length(number))
		return report_error("%s: frame %u came back with %u bytes", device->bus.name, number, length);
	for (i = 2, word = number; i < frame_words(frame->length); i++, word += STEP) {
		if (frame->words[i] != word)
			return report_error("%s: frame %u came back with another byte %u", device->bus.name, number,
					    16 + 4 * i);
	}
	net->bytes_checked += length - HEADER_BYTES;
	return 0;
}

/* Take what came in, give the buffers back. The number of frames, or -1. */
static int net_receive(struct device *device)
{
	struct queue *queue = &device->queues[QUEUE_RECEIVE];
	struct slot *slot;
	uint32_t length;
	int taken = 0;

	while ((slot = queue_take(queue, &length))) {
		if (net_check_frame(device, slot, length))
			return -1;
		net_give_receive(device, slot);
		taken++;
	}
	queue_publish(queue);
	return taken;
}

static int net_work(struct device *device, uint32_t requests)
{
	struct net *net = device->state;
	uint32_t end = net->next + requests, done = 0, before, seen, length;
	struct slot *slot;
	int received;

	while (done < requests || (options.net == NET_REFLECT && net->expected != end)) {
		before = done;
		/* No more under way than there are buffers for: a frame without one is dropped (5.1.6.4). */
		while (net->next != end && (options.net != NET_REFLECT || net->next - net->expected < SLOTS) &&
		       net_give_transmit(device))
			;
		seen = device->interrupts;
		queue_publish(&device->queues[QUEUE_TRANSMIT]);
		while ((slot = queue_take(&device->queues[QUEUE_TRANSMIT], &length))) {
			slot->busy = false;
			net->sent++;
			done++;
		}
		received = net_receive(device);
		if (received < 0)
			return -1;
		if (!received && done == before &&
		    device_wait(device, seen, done < requests ? "frames to be sent" : "frames to come back"))
			return -1;
	}
	return 0;
}

static int net_check(struct device *device)
{
	if (net_work(device, options.requests))
		return -1;
	if (options.net == NET_DROP) {
		interrupts_pause(GRACE_TICKS);
		return net_receive(device) < 0 ? -1 : 0;
	}
	return 0;
}

static int net_leave(struct device *device)
{
	while (net_give_transmit(device))
		;
	queue_publish(&device->queues[QUEUE_TRANSMIT]);
	return 0;
}

static void net_report(const struct device *device)
{
	const struct net *net = device->state;

	report("%s.sent=%u", device->bus.name, net->sent);
	report("%s.received=%u", device->bus.name, net->received);
	report("%s.foreign=%u", device->bus.name, net->foreign);
	report("%s.late=%u", device->bus.name, net->late);
	report("%s.bytes_checked=%u", device->bus.name, net->bytes_checked);
}

const struct driver net_driver = {
	.id = 1,
	.name = "net",
	.features = FEATURE_MAC,
	.queue_count = net_queue_count,
	.begin = net_begin,
	.check = net_check,
	.work = net_work,
	.leave = net_leave,
	.report = net_report,
};
