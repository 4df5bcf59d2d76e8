/*
 * A vCPU and its thread. The thread never calls Python; it leaves the guest when it is kicked: `immediate_exit` catches
 * the moments outside KVM_RUN, the signal those inside.
 */
#include "vmm.h"

#include <linux/kvm.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define KICK_SIGNAL (SIGRTMIN + 6) /* the data plane has SIGRTMIN + 5 */

static pthread_once_t handler_once = PTHREAD_ONCE_INIT;

static void on_kick(int number)
{
	(void)number; /* that KVM_RUN returns is all it is for */
}

static void handler_install(void)
{
	struct sigaction action = { .sa_handler = on_kick };

	sigaction(KICK_SIGNAL, &action, NULL);
}

int vcpu_open(struct vm *vm, uint32_t index, uint32_t *step)
{
	struct vcpu *v = &vm->vcpus[index];
	void *run;
	int rc;

	*step = VM_STEP_VCPU;
	v->vm = vm;
	v->index = index;
	v->fd = ioctl(vm->fd, KVM_CREATE_VCPU, index);
	if (v->fd < 0)
		return -errno;
	*step = VM_STEP_VCPU_STATE;
	run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	if (run == MAP_FAILED) {
		rc = -errno;
		close(v->fd);
		return rc;
	}
	v->run = run;
	return 0;
}

void vcpu_close(struct vcpu *v)
{
	munmap(v->run, v->vm->run_size);
	close(v->fd);
}

int vcpu_set_cpuid(struct vm *vm, uint32_t vcpu, const struct cpuid_entry *entries, uint32_t count)
{
	struct kvm_cpuid2 *cpuid;
	int rc;

	cpuid = calloc(1, sizeof(*cpuid) + count * sizeof(cpuid->entries[0]));
	if (!cpuid)
		return -ENOMEM;
	cpuid->nent = count;
	for (uint32_t i = 0; i < count; i++)
		cpuid->entries[i] = (struct kvm_cpuid_entry2){
			.function = entries[i].leaf,
			.index = entries[i].subleaf,
			.flags = entries[i].flags,
			.eax = entries[i].eax,
			.ebx = entries[i].ebx,
			.ecx = entries[i].ecx,
			.edx = entries[i].edx,
		};
	rc = ioctl(vm->vcpus[vcpu].fd, KVM_SET_CPUID2, cpuid) < 0 ? -errno : 0;
	free(cpuid);
	return rc;
}

static void *vcpu_main(void *argument)
{
	struct vcpu *v = argument;
	struct vm *vm = v->vm;
	sigset_t kick;

	sigemptyset(&kick);
	sigaddset(&kick, KICK_SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
	while (!load_acquire(&vm->stopping)) {
		if (ioctl(v->fd, KVM_RUN, 0) < 0) {
			/* EAGAIN: a vCPU that waited for its SIPI was woken. */
			if (errno == EINTR || errno == EAGAIN)
				continue;
			exit_failed(v, errno);
			break;
		}
		stat_add(&v->stats.exits, 1);
		if (!exit_serve(v))
			break;
	}
	/* The instruction that exited is finished by the next KVM_RUN: so that nothing is left over for a further run. */
	store_relaxed(&v->run->immediate_exit, 1);
	(void)ioctl(v->fd, KVM_RUN, 0);
	__atomic_fetch_sub(&vm->running, 1, __ATOMIC_RELEASE);
	wake(vm->event_fd);
	return NULL;
}

static int vcpu_start(struct vcpu *v)
{
	char name[16];

	snprintf(name, sizeof(name), "hb-vcpu%u", v->index);
	return thread_start(&v->thread, vcpu_main, v, name); /* vcpu_main unblocks its kick */
}

int vm_start(struct vm *vm)
{
	int rc = 0;

	if (vm->threads)
		return VMM_E_RUNNING;
	pthread_once(&handler_once, handler_install);
	store_relaxed(&vm->stopping, 0);
	store_relaxed(&vm->ended, 0);
	for (uint32_t i = 0; i < vm->vcpu_count; i++) {
		handover_reset(&vm->vcpus[i].handover);
		store_relaxed(&vm->vcpus[i].run->immediate_exit, 0);
	}
	store_relaxed(&vm->running, vm->vcpu_count);
	while (vm->threads < vm->vcpu_count && rc == 0) {
		rc = vcpu_start(&vm->vcpus[vm->threads]);
		if (rc == 0)
			vm->threads++;
	}
	if (rc < 0) {
		vm_stop(vm);
		vm_join(vm);
	}
	return rc;
}

void vm_stop(struct vm *vm)
{
	store_release(&vm->stopping, 1);
	for (uint32_t i = 0; i < vm->threads; i++) {
		struct vcpu *v = &vm->vcpus[i];

		store_relaxed(&v->run->immediate_exit, 1);
		handover_abandon(&v->handover);
		pthread_kill(v->thread, KICK_SIGNAL);
	}
}

uint32_t vm_running(struct vm *vm)
{
	return load_acquire(&vm->running);
}

void vm_join(struct vm *vm)
{
	for (uint32_t i = 0; i < vm->threads; i++)
		pthread_join(vm->vcpus[i].thread, NULL);
	vm->threads = 0;
}

int vm_take_access(struct vm *vm, struct access *out)
{
	for (uint32_t i = 0; i < vm->vcpu_count; i++)
		if (handover_take(&vm->vcpus[i].handover, out))
			return 1;
	return 0;
}

void vm_answer(struct vm *vm, uint32_t vcpu, uint64_t data)
{
	handover_answer(&vm->vcpus[vcpu].handover, data);
}
