/*
 * A small guest program: a virtio driver that needs nothing but a PVH loader (start/start.S), for virtio-mmio devices
 * (version 2) that interrupt by the I/O APIC. It sets up every device it is told of, makes it work, checks every byte,
 * counts doorbells and interrupts, and reports on port 0xe9 (start/report.c). Built for 32-bit and for 64-bit.
 *
 * The command line, words "key=value", numbers decimal or 0x...:
 *
 *   device=ID:BASE:GSI:PORT  one for each device: virtio id (2 blk, 4 rng, 1 net), registers, interrupt, and the notify
 *                            port, 0 if there is none
 *   doorbell=auto            hypercall where both keys are there and agree, else plain; "hypercall" makes it an error
 *                            when they do not; "mmio" and "pio" are plain
 *   plain=mmio               what the plain doorbell is for the first two: "mmio" or "pio"
 *   rearm=0                  after so many plain rings try the hypercall again (0: never): a queue that was refused, and
 *                            one whose device withheld its key
 *   requests=16              for each device, each of writing and reading where it does both
 *   event_idx=0              1: negotiate it where it is offered
 *   net=none                 "reflect": each frame must come back, "drop": none may
 *   seed=1                   of the pattern on disks (drivers/pattern.c; the host knows it too)
 *   patience=10              seconds, about: a request unanswered for longer is an error
 *   mode=check               what is done, one of:
 *     check     every device: all that it promises
 *     nonsense  the first device gets nonsense in all its registers before, and every device is checked then
 *     flood     doorbells of queues that do not exist: before the devices are set up, and while they work
 *     outside   the first device gets rings outside memory and such before; lenient=1: only say what it does
 *     loop      I/O on all devices in turn; every=100 requests a line "progress" and all counters so far; ends after
 *               ``requests`` of them, or earlier when the host writes "STOP" to the last sector of the first disk
 *     reset     every device is reset while it has requests, set up again, and checked, three times
 */
#include "drivers/drivers.h"
#include "hostile.h"
#include "start/interrupts.h"
#include "start/report.h"

#define RESETS 3

void toy_main(uint32_t start_info_gpa);

static struct device devices[OPTIONS_DEVICES];

static int begin_all(void)
{
	uint32_t i;

	for (i = 0; i < options.device_count; i++) {
		if (device_begin(&devices[i]))
			return -1;
	}
	return 0;
}

static int check_all(void)
{
	uint32_t i;
	int failed = 0;

	/* A device that fails does not spare the others. */
	for (i = 0; i < options.device_count; i++)
		failed |= devices[i].driver->check(&devices[i]);
	return failed;
}

static int run_check(void)
{
	return begin_all() || check_all();
}

static int run_nonsense(void)
{
	return hostile_nonsense(&devices[0]) || run_check();
}

static int run_outside(void)
{
	return hostile_outside(&devices[0]) || run_check();
}

static int run_flood(void)
{
	return hostile_flood(&devices[0]) || begin_all() || hostile_flood(&devices[0]) || check_all();
}

static int run_reset(void)
{
	uint32_t round, i;

	for (round = 0; round < RESETS; round++) {
		if (run_check())
			return -1;
		for (i = 0; i < options.device_count; i++) {
			if (devices[i].driver->leave(&devices[i]) || device_reset(&devices[i]))
				return -1;
		}
	}
	report("resets=%u", round);
	return run_check();
}

static int run_loop(void)
{
	uint32_t done = 0, step, i;
	bool stop = false;

	if (begin_all())
		return -1;
	while (done < options.requests && !stop) {
		step = options.requests - done < options.every ? options.requests - done : options.every;
		for (i = 0; i < options.device_count; i++) {
			if (devices[i].driver->work(&devices[i], step))
				return -1;
		}
		done += step;
		for (i = 0; i < options.device_count; i++)
			device_report_doorbells(&devices[i]);
		report("progress=%u", done);
		for (i = 0; i < options.device_count && !stop; i++)
			stop = devices[i].driver->told_to_stop && devices[i].driver->told_to_stop(&devices[i]);
	}
	report("stopped=%u", stop);
	return 0;
}

static int run_mode(void)
{
	switch (options.mode) {
	case MODE_NONSENSE:
		return run_nonsense();
	case MODE_FLOOD:
		return run_flood();
	case MODE_OUTSIDE:
		return run_outside();
	case MODE_LOOP:
		return run_loop();
	case MODE_RESET:
		return run_reset();
	default:
		return run_check();
	}
}

static int find_all(void)
{
	uint32_t i;

	for (i = 0; i < options.device_count; i++) {
		const struct driver *driver = driver_find(options.devices[i].id);

		if (!driver)
			return report_error("command line: no driver for device id %u", options.devices[i].id);
		if (device_find(&devices[i], i, &options.devices[i], driver))
			return -1;
	}
	return 0;
}

static void end_all(void)
{
	uint32_t i;

	for (i = 0; i < options.device_count; i++) {
		if (!devices[i].state)
			continue; /* it never came up */
		devices[i].driver->report(&devices[i]);
		device_report(&devices[i]);
		device_reset(&devices[i]);
	}
}

void toy_main(uint32_t start_info_gpa)
{
	report("bits=%u", (uint32_t)sizeof(void *) * 8);
	if (!options_parse(start_info_gpa) && !interrupts_start(options.patience)) {
		doorbell_find_platform();
		if (!find_all()) {
			run_mode();
			end_all();
		}
	}
	report_exit();
}
