/* The vCPUs of this process: their statistics, their CPUID leaves, and whether their guest has come from elsewhere. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>

#include "preload.h"

#define HV_X64_MSR_GUEST_OS_ID 0x40000000u

static struct vm *vm_by_vcpu(int fd, struct vcpu **vcpu)
{
	for (unsigned int i = 0; i < VMS_MAX; i++)
		for (unsigned int k = 0; vms[i] && k < vms[i]->vcpu_count; k++)
			if (vms[i]->vcpus[k].fd == fd) {
				*vcpu = &vms[i]->vcpus[k];
				return vms[i];
			}
	return NULL;
}

/* A vCPU's statistics have to be asked for now: once it runs, KVM would let the caller wait. */
void vcpu_created(int vm_fd, int fd, uint32_t number)
{
	struct vcpu *vcpu, *grown;
	struct vm *vm;

	pthread_mutex_lock(&state_lock);
	vm = vm_by_vcpu(fd, &vcpu);
	if (vm)
		vcpu->fd = -1;	/* the number was another vCPU's, which is closed by now */
	vm = vm_by_fd(vm_fd);
	grown = vm && vm->vcpu_count < VCPUS_MAX ? realloc(vm->vcpus, (vm->vcpu_count + 1) * sizeof(*grown)) : NULL;
	if (grown) {
		vm->vcpus = grown;
		vcpu = &vm->vcpus[vm->vcpu_count++];
		*vcpu = (struct vcpu){ .fd = fd, .number = number };
		vcpu->stats_fd = kvm_ioctl(fd, KVM_GET_STATS_FD, NULL);
		if (vcpu->stats_fd >= 0)
			fcntl(vcpu->stats_fd, F_SETFD, FD_CLOEXEC);
		vm_wake(vm);
	} else if (vm) {
		vm_withhold(vm, WIRE_REASON_CPUID_REFUSED);	/* this vCPU could not be given the leaf */
	}
	pthread_mutex_unlock(&state_lock);
}

/* What came of giving a vCPU its leaves: note it, and why there shall be no ids, if so. */
static void note_cpuid(int fd, uint32_t flags, int reason)
{
	struct vcpu *vcpu;
	struct vm *vm;
	bool news = false;

	pthread_mutex_lock(&state_lock);
	vm = vm_by_vcpu(fd, &vcpu);
	if (vm) {
		vcpu->key_shown |= (flags & WIRE_VM_KEY_SHOWN) != 0;
		if (vm->reason)
			flags &= ~WIRE_VM_KEY_SHOWN;
		if ((vm->flags | flags) != vm->flags) {
			vm->flags |= flags;
			vm->changed = true;
			vm_wake(vm);
		}
		if (reason)
			news = vm_withhold(vm, reason);
	}
	pthread_mutex_unlock(&state_lock);
	if (news)
		say_why(reason);
}

int vcpu_set_cpuid(int fd, struct kvm_cpuid2 *cpuid)
{
	struct kvm_cpuid2 *copy = NULL;
	struct vcpu *vcpu;
	struct vm *vm;
	uint32_t key = 0, flags = WIRE_VM_CPUID_SEEN;
	bool has_key = false;
	int result, error, reason = 0;

	pthread_mutex_lock(&state_lock);
	vm = vm_by_vcpu(fd, &vcpu);
	if (vm) {
		has_key = !vm->reason || vcpu->key_shown;
		key = vm->key;
	}
	pthread_mutex_unlock(&state_lock);
	if (!vm)
		return kvm_ioctl(fd, KVM_SET_CPUID2, cpuid);

	flags |= cpuid_may_nest(cpuid) ? WIRE_VM_MAY_NEST : 0;
	flags |= cpuid_has_hyperv(cpuid) ? WIRE_VM_HYPERV : 0;
	if (!(flags & WIRE_VM_HYPERV))
		reason = WIRE_REASON_NO_HYPERV;
	else if (has_key)
		copy = cpuid_with_key(cpuid, key);
	result = copy ? kvm_ioctl(fd, KVM_SET_CPUID2, copy) : -1;
	error = errno;
	free(copy);
	if (!copy || result < 0) {
		result = kvm_ioctl(fd, KVM_SET_CPUID2, cpuid);
		error = errno;
		if (!reason && has_key)
			reason = WIRE_REASON_CPUID_REFUSED;
	} else {
		flags |= WIRE_VM_KEY_SHOWN;
	}
	if (result >= 0)
		note_cpuid(fd, flags, reason);
	errno = error;
	return result;
}

/*
 * After KVM_SET_MSRS. Whoever lets a guest speak Hyper-V's hypercalls writes GUEST_OS_ID first, so a driver that rings has
 * done so. QEMU writes it too: 0 when the machine begins or is reset, and what was saved when it comes from a snapshot or
 * a migration. So if it is not 0, the guest has a past, of which the command line need not tell: `loadvm` in the monitor.
 * Only a key that was given is surely the one it remembers.
 */
void vcpu_msrs_set(int fd, const struct kvm_msrs *msrs)
{
	struct vcpu *vcpu;
	struct vm *vm;
	bool has_past = false, news = false;

	for (uint32_t i = 0; i < msrs->nmsrs; i++)
		has_past |= msrs->entries[i].index == HV_X64_MSR_GUEST_OS_ID && msrs->entries[i].data;
	if (!has_past)
		return;
	pthread_mutex_lock(&state_lock);
	vm = vm_by_vcpu(fd, &vcpu);
	if (vm && !(vm->flags & WIRE_VM_INCOMING)) {
		vm->flags |= WIRE_VM_INCOMING;
		vm->changed = true;
		vm_wake(vm);
	}
	if (vm && !(vm->flags & WIRE_VM_KEY_STABLE))
		news = vm_withhold(vm, WIRE_REASON_INCOMING);
	pthread_mutex_unlock(&state_lock);
	if (news)
		say_why(WIRE_REASON_INCOMING);
}
