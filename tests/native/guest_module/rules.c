/*
 * The decisions of the guest's module, on a kernel of the test's own: when a queue rings by hypercall, when it tries
 * again, and what it makes of another platform. The sources are the module's; `rules NAME` plays one scenario.
 */
#include "world.h"

#define SCENARIO(name) static void name(void)

SCENARIO(a_queue_whose_offer_is_taken_back_and_given_again_rearms_by_itself)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(places); i++) {
		struct place *place = &places[i];

		load();
		CHECK(ring(place));
		place->withheld = true;
		CHECK(!ring(place));
		pass(0);
		CHECK(state_of(place) == HB_WAITING);
		place->withheld = false;
		pass(10 * SECOND - 1);
		CHECK(!ring(place));
		pass(1);
		CHECK(ring(place));
		CHECK(queue_of(place)->refused.value == 1);
	}
}

SCENARIO(a_withheld_queue_is_looked_at_ever_more_seldom_and_never_rung)
{
	unsigned long expected = 10 * SECOND;

	load();
	CHECK(ring(disk));
	disk->withheld = true;
	CHECK(!ring(disk));
	pass(0);
	for (int i = 0; i < 10; i++) {
		CHECK(state_of(disk) == HB_WAITING && queue_of(disk)->bell == 0);
		CHECK(queue_of(disk)->due - jiffies == expected);
		pass(expected);
		CHECK(!ring(disk));
		expected = min(2 * expected, 10UL * MINUTE);
	}
	CHECK(queue_of(disk)->refused.value == 1);
	CHECK(expected == 10UL * MINUTE);
	disk->withheld = false;
	pass(expected);
	CHECK(ring(disk));
	/* It has rung, so the next refusal is a first one. */
	disk->withheld = true;
	CHECK(!ring(disk));
	pass(0);
	CHECK(queue_of(disk)->due - jiffies == 10 * SECOND);
}

SCENARIO(a_queue_that_is_refused_each_time_it_is_armed_waits_twice_as_long)
{
	unsigned long expected = 10 * SECOND;

	load();
	CHECK(ring(other));
	other->withheld = true;
	for (int i = 0; i < 10; i++) {
		CHECK(!ring(other));
		pass(0);
		CHECK(state_of(other) == HB_WAITING);
		CHECK(queue_of(other)->due - jiffies == expected);
		pass(expected);
		CHECK(state_of(other) == HB_ARMED);
		expected = min(2 * expected, 10UL * MINUTE);
	}
	CHECK(queue_of(other)->refused.value == 10);
}

SCENARIO(an_offer_that_goes_and_comes_while_waiting_neither_rings_nor_resets_the_delay)
{
	load();
	disk->withheld = true;
	CHECK(!ring(disk));
	pass(0);
	for (int i = 0; i < 9; i++) {
		disk->withheld = i % 2;
		hb_scan_soon();
		pass(SECOND);
		CHECK(state_of(disk) == HB_WAITING);
	}
	pass(SECOND);
	CHECK(ring(disk));
}

SCENARIO(an_armed_queue_whose_bell_is_found_gone_waits_and_rearms)
{
	load();
	disk->withheld = true;
	hb_scan_soon(); /* for another device's sake; the disk has not rung meanwhile */
	pass(0);
	CHECK(state_of(disk) == HB_WAITING);
	disk->withheld = false;
	pass(10 * SECOND);
	CHECK(ring(disk));
	CHECK(queue_of(disk)->refused.value == 0);
}

SCENARIO(a_queue_that_never_had_a_bell_is_plain_and_keeps_nobody_awake)
{
	disk->withheld = true;
	load();
	CHECK(state_of(disk) == HB_PLAIN);
	CHECK(state_of(other) == HB_ARMED);
	CHECK(hb_scan_worker.delay == MAX_JIFFY_OFFSET);
	disk->withheld = false;
	hb_scan_now(true);
	CHECK(ring(disk));
}

SCENARIO(a_device_set_up_anew_is_armed_at_once_and_its_delay_forgotten)
{
	load();
	disk->withheld = true;
	CHECK(!ring(disk));
	pass(30 * SECOND);
	set_up_anew(disk);
	CHECK(state_of(disk) == HB_PLAIN);
	CHECK(hb_scan_worker.delay == MAX_JIFFY_OFFSET);
	disk->withheld = false;
	set_up_anew(disk);
	CHECK(ring(disk));
	disk->withheld = true;
	CHECK(!ring(disk));
	pass(0);
	CHECK(queue_of(disk)->due - jiffies == 10 * SECOND);
}

SCENARIO(a_device_that_has_gone_keeps_nobody_awake)
{
	load();
	disk->withheld = true;
	CHECK(!ring(disk));
	pass(0);
	CHECK(state_of(disk) == HB_WAITING);
	disk->status = 0;
	disk->vdev.dev.driver = NULL;
	pass(MINUTE);
	CHECK(!hb_queue_find(&disk->vqs[1]));
	CHECK(hb_scan_worker.delay == MAX_JIFFY_OFFSET);
}

SCENARIO(by_hand_a_waiting_queue_is_armed_at_once_and_its_delay_forgotten)
{
	load();
	disk->withheld = other->withheld = true;
	CHECK(!ring(disk) && !ring(other));
	pass(5 * MINUTE);
	CHECK(!ring(other)); /* for the second time */
	pass(0);
	CHECK(state_of(other) == HB_WAITING);
	hb_scan_now(true);
	CHECK(state_of(disk) == HB_WAITING);
	CHECK(queue_of(disk)->due - jiffies == 10 * SECOND);
	CHECK(state_of(other) == HB_ARMED); /* on PCI only a ring tells */
	CHECK(!ring(other));
	pass(0);
	CHECK(queue_of(other)->due - jiffies == 10 * SECOND);
	disk->withheld = false;
	hb_scan_now(true);
	CHECK(ring(disk));
}

SCENARIO(by_hand_beside_a_busy_device_a_withdrawn_queue_is_refused_no_more_often)
{
	load();
	disk->vdev.dev.locked = true;
	other->withheld = true;
	hb_scan_now(true);
	for (int i = 0; i < 600; i++) { /* a minute */
		ring(other);
		pass(100);
	}
	CHECK(queue_of(other)->refused.value == 3); /* at once, after 10 s and after 20 more */
}

SCENARIO(a_busy_devices_queue_that_is_due_is_armed_when_it_is_free_and_does_not_spin_meanwhile)
{
	for (int on_parent = 0; on_parent < 2; on_parent++) {
		bool *locked = on_parent ? &disk->parent.locked : &disk->vdev.dev.locked;
		int before;

		load();
		disk->withheld = true;
		CHECK(!ring(disk));
		pass(0);
		disk->withheld = false;
		*locked = true;
		hb_scan_now(true);
		before = scans;
		pass(MINUTE);
		CHECK(state_of(disk) == HB_WAITING);
		CHECK(scans - before <= 600);
		*locked = false;
		pass(100);
		CHECK(ring(disk));
		CHECK(hb_scan_worker.delay == MAX_JIFFY_OFFSET);
	}
}

SCENARIO(a_guest_resumed_under_another_key_rings_with_that_and_says_so_once)
{
	load();
	CHECK(ring(disk) && ring(other));
	logs = 0;
	platform.key = 0x123456;
	platform.id = 0; /* another VM's */
	set_up_anew(disk);
	CHECK(queue_of(disk)->id == (bell_of(disk) ^ 0x123456));
	CHECK(queue_of(other)->id == (bell_of(other) ^ 0x123456));
	CHECK(ring(disk) && ring(other));
	CHECK(platform.id != 0);
	hb_scan_now(true);
	CHECK(logs == 1);
	CHECK(strstr(last_log, "another key"));
}

SCENARIO(under_another_key_a_busy_devices_queues_are_plain_until_they_are_met_again)
{
	load();
	CHECK(ring(disk));
	platform.key = 0x123456;
	disk->vdev.dev.locked = true;
	set_up_anew(other);
	CHECK(state_of(disk) == HB_PLAIN && state_of(other) == HB_ARMED);
	disk->vdev.dev.locked = false;
	pass(100);
	CHECK(ring(disk));
}

SCENARIO(a_guest_resumed_where_nothing_is_offered_is_plain_everywhere_and_says_so_once)
{
	load();
	disk->withheld = true;
	CHECK(!ring(disk));
	pass(0);
	CHECK(platform.id != 0);
	disk->vdev.dev.locked = true;
	logs = 0;
	platform.leaf = false;
	set_up_anew(other);
	CHECK(state_of(disk) == HB_PLAIN && state_of(other) == HB_PLAIN);
	CHECK(platform.id == 0);
	CHECK(!hb_platform_available());
	CHECK(logs == 1 && strstr(last_log, "not available"));
	disk->vdev.dev.locked = false;
	pass(MINUTE);
	CHECK(hb_scan_worker.delay == MAX_JIFFY_OFFSET);
	CHECK(logs == 1);
}

SCENARIO(a_guest_resumed_where_there_is_an_offer_is_armed)
{
	platform.leaf = false;
	load();
	CHECK(state_of(disk) == HB_PLAIN && state_of(other) == HB_PLAIN && platform.id == 0);
	CHECK(logs == 1);
	platform.leaf = true;
	set_up_anew(disk);
	CHECK(ring(disk) && ring(other));
	CHECK(platform.id != 0);
	CHECK(logs == 2);
}

SCENARIO(a_guest_os_id_of_somebody_elses_is_left_alone)
{
	platform.id = 0x42;
	load();
	CHECK(ring(disk));
	hb_platform_withdraw();
	CHECK(platform.id == 0x42);
	platform.id = 0;
	hb_scan_now(false);
	CHECK(platform.id == HB_GUEST_OS_ID);
	platform.id = 0x42; /* of the host on which it was resumed */
	hb_platform_withdraw();
	CHECK(platform.id == 0x42);
}

static void refused_because(const char *reason)
{
	char page[4096];

	hb_scan_soon();
	pass(0);
	hb_platform_describe(page);
	CHECK(!hb_platform_available() && hb_platform_key() == 0);
	CHECK(strstr(page, reason));
	CHECK(strstr(last_log, reason));
	CHECK(state_of(disk) == HB_PLAIN && state_of(other) == HB_PLAIN);
	begin();
	hb_scan_soon();
	pass(0);
	hb_platform_describe(page);
	CHECK(!strcmp(page, "available\n"));
	CHECK(ring(disk) && ring(other));
}

SCENARIO(each_thing_that_is_missing_is_a_reason_of_its_own)
{
	load();
	platform.hypervisor = false;
	refused_because("CPUID shows no hypervisor");
	platform.hyperv = false;
	refused_because("no Hyper-V leaves");
	platform.interface = false;
	refused_because("Hv#1");
	platform.msrs = false;
	refused_because("no hypercall MSRs");
	platform.leaf = false;
	refused_because("no HyperBellVMM leaf");
	platform.version = 2;
	refused_because("version 2 of the doorbell, not 1");
	platform.offered = false;
	refused_because("withholds");
	platform.key = 0;
	refused_because("not a number of 24 bits");
	platform.key = 0x1000000;
	refused_because("not a number of 24 bits");
	platform.encrypted = true;
	refused_because("encrypted");
	platform.has_id = false;
	refused_because("GUEST_OS_ID cannot be read");
	platform.id_fixed = true;
	platform.id = 0;
	refused_because("GUEST_OS_ID cannot be written");
}

SCENARIO(with_two_cpus_each_of_kvms_own_hypercalls_is_a_reason)
{
	static const unsigned int bits[] = { 7, 11, 13, 16 };

	for (unsigned int i = 0; i < ARRAY_SIZE(bits); i++) {
		hb_pv_bits_seen = 0; /* another guest */
		platform.pv_bits = 1U << bits[i];
		hb_scan_now(false);
		CHECK(!hb_platform_available());
		CHECK(strstr(last_log, "2 CPUs and KVM's own hypercalls"));
		CHECK(platform.id == 0);
	}
	platform.cpus = 1;
	hb_scan_now(false);
	CHECK(ring(disk));
}

SCENARIO(kvms_own_hypercalls_stay_a_reason_where_the_guest_is_resumed_without_them)
{
	platform.pv_bits = 1U << 7;
	platform.leaf = false;
	load();
	platform.pv_bits = 0;
	platform.leaf = true;
	set_up_anew(disk);
	CHECK(!hb_platform_available());
	CHECK(state_of(disk) == HB_PLAIN);
	CHECK(strstr(last_log, "KVM's own hypercalls"));
}

static const struct { const char *name; void (*play)(void); } scenarios[] = {
#include "scenarios.h"
};

int main(int argc, char **argv)
{
	for (unsigned int i = 0; argc == 2 && i < ARRAY_SIZE(scenarios); i++) {
		if (strcmp(argv[1], scenarios[i].name))
			continue;
		begin();
		scenarios[i].play();
		return 0;
	}
	fprintf(stderr, "rules NAME: there is no such scenario\n");
	return 2;
}
