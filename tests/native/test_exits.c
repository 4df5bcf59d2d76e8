/*
 * Exits that no guest here can be made to take, as KVM would report them: what the machine makes of each. A vCPU
 * without a KVM behind it: only its struct kvm_run is real.
 */
#include "vmm.h"
#include "check.h"

#include <linux/kvm.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define RUN_SIZE 12288

static struct vm vm;
static union {
	struct kvm_run run;
	uint8_t bytes[RUN_SIZE];
} state;

static struct vcpu *vcpu_after(uint32_t exit_reason)
{
	struct vcpu *v = &vm.vcpus[2];

	memset(&state, 0, sizeof(state));
	state.run.exit_reason = exit_reason;
	vm.ended = 0;
	v->vm = &vm;
	v->index = 2;
	v->fd = -1;
	v->run = &state.run;
	return v;
}

static struct vm_end end_of(struct vcpu *v)
{
	struct vm_end end;

	CHECK(!exit_serve(v));
	vm_read_end(&vm, &end);
	CHECK(end.vcpu == 2);
	return end;
}

static void a_hypercall_that_nobody_has_gets_a_status(void)
{
	struct vcpu *v = vcpu_after(KVM_EXIT_HYPERV);
	struct vm_stats stats;

	state.run.hyperv.type = KVM_EXIT_HYPERV_HCALL;
	state.run.hyperv.u.hcall.input = 0x1005d;
	CHECK(exit_serve(v));
	CHECK(state.run.hyperv.u.hcall.result == 0x12);
	state.run.hyperv.type = KVM_EXIT_HYPERV_SYNIC;
	CHECK(exit_serve(v));
	vm.vcpu_count = 3;
	vm_read_stats(&vm, &stats);
	CHECK(stats.refused_hypercalls == 1);
}

static void an_interrupted_run_goes_on(void)
{
	CHECK(exit_serve(vcpu_after(KVM_EXIT_INTR)));
}

static void a_failed_entry_keeps_its_numbers(void)
{
	struct vcpu *v = vcpu_after(KVM_EXIT_FAIL_ENTRY);
	struct vm_end end;

	state.run.fail_entry.hardware_entry_failure_reason = 0x80000021;
	state.run.fail_entry.cpu = 1;
	end = end_of(v);
	CHECK(end.kind == VM_END_FAILED && end.exit_reason == KVM_EXIT_FAIL_ENTRY);
	CHECK(end.words == 2 && end.data[0] == 0x80000021 && end.data[1] == 1);
}

static void an_internal_error_is_not_believed_beyond_its_room(void)
{
	struct vcpu *v = vcpu_after(KVM_EXIT_INTERNAL_ERROR);
	struct vm_end end;

	state.run.internal.suberror = 3;
	state.run.internal.ndata = 2;
	state.run.internal.data[0] = 10;
	state.run.internal.data[1] = 20;
	end = end_of(v);
	CHECK(end.kind == VM_END_FAILED && end.words == 3);
	CHECK(end.data[0] == 3 && end.data[1] == 10 && end.data[2] == 20);

	v = vcpu_after(KVM_EXIT_INTERNAL_ERROR);
	state.run.internal.ndata = UINT32_MAX;
	end = end_of(v);
	CHECK(end.words == ARRAY_SIZE(end.data));
}

static void system_events_end_it_each_in_its_way(void)
{
	struct vcpu *v = vcpu_after(KVM_EXIT_SYSTEM_EVENT);

	state.run.system_event.type = KVM_SYSTEM_EVENT_SHUTDOWN;
	CHECK(end_of(v).kind == VM_END_POWER_OFF);
	v = vcpu_after(KVM_EXIT_SYSTEM_EVENT);
	state.run.system_event.type = KVM_SYSTEM_EVENT_RESET;
	CHECK(end_of(v).kind == VM_END_RESET);
	v = vcpu_after(KVM_EXIT_SYSTEM_EVENT);
	state.run.system_event.type = KVM_SYSTEM_EVENT_CRASH;
	CHECK(end_of(v).kind == VM_END_FAILED);
	CHECK(end_of(vcpu_after(0x77)).exit_reason == 0x77);
}

static void the_first_end_counts(void)
{
	struct vcpu *v = vcpu_after(KVM_EXIT_SHUTDOWN);
	struct vm_end end;

	CHECK(end_of(v).status == VM_RESET_TRIPLE_FAULT);
	exit_failed(v, EFAULT);
	vm_read_end(&vm, &end);
	CHECK(end.kind == VM_END_RESET);
	v = vcpu_after(0);
	exit_failed(v, EFAULT);
	vm_read_end(&vm, &end);
	CHECK(end.kind == VM_END_FAILED && end.error == -EFAULT);
}

int main(void)
{
	alarm(100);
	vm.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	output_init(&vm.output);
	an_interrupted_run_goes_on();
	a_hypercall_that_nobody_has_gets_a_status();
	a_failed_entry_keeps_its_numbers();
	an_internal_error_is_not_believed_beyond_its_room();
	system_events_end_it_each_in_its_way();
	the_first_end_counts();
	pthread_mutex_destroy(&vm.output.lock);
	close(vm.event_fd);
	printf("ok\n");
	return 0;
}
