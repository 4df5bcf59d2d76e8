/*
 * The machine: memory, the kernel's interrupt controller and timer, and the eventfds through which it is spoken to.
 * What is not the vCPUs' own business is called by Python on one thread.
 */
#include "vmm.h"

#include <linux/kvm.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* Four pages that Intel's VMX needs, and no guest of ours may use: right below the top of 4 GiB, as elsewhere. */
#define IDENTITY_MAP_GPA 0xfffbc000ull
#define TSS_GPA 0xfffbd000ull

static int step(uint32_t *at, uint32_t number, int rc)
{
	*at = number;
	return rc < 0 ? -errno : 0;
}

static int vm_build(struct vm *vm, int kvm_fd, int ram_fd, uint32_t vcpus, uint32_t *at)
{
	struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
	uint64_t identity_map = IDENTITY_MAP_GPA;
	struct kvm_userspace_memory_region slot;
	int rc;

	vm->fd = ioctl(kvm_fd, KVM_CREATE_VM, 0);
	if ((rc = step(at, VM_STEP_CREATE, vm->fd)) < 0)
		return rc;
	if ((rc = step(at, VM_STEP_TSS, ioctl(vm->fd, KVM_SET_TSS_ADDR, TSS_GPA))) < 0)
		return rc;
	if ((rc = step(at, VM_STEP_IDENTITY_MAP, ioctl(vm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map))) < 0)
		return rc;
	if ((rc = step(at, VM_STEP_IRQCHIP, ioctl(vm->fd, KVM_CREATE_IRQCHIP, 0))) < 0)
		return rc;
	if ((rc = step(at, VM_STEP_PIT, ioctl(vm->fd, KVM_CREATE_PIT2, &pit))) < 0)
		return rc;
	vm->ram = mmap(NULL, vm->ram_size, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
	if ((rc = step(at, VM_STEP_RAM, vm->ram == MAP_FAILED ? -1 : 0)) < 0)
		return rc;
	slot = (struct kvm_userspace_memory_region){
		.memory_size = vm->ram_size,
		.userspace_addr = (uint64_t)(uintptr_t)vm->ram,
	};
	if ((rc = step(at, VM_STEP_MEMORY_SLOT, ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &slot))) < 0)
		return rc;
	rc = ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (step(at, VM_STEP_VCPU, rc) < 0)
		return -errno;
	vm->run_size = (uint32_t)rc;
	for (uint32_t i = 0; i < vcpus; i++) {
		rc = vcpu_open(vm, i, at);
		if (rc < 0)
			return rc;
		vm->vcpu_count++;
	}
	return 0;
}

struct vm *vm_new(int kvm_fd, int ram_fd, uint64_t ram_size, uint32_t vcpus, int event_fd, struct vm_failure *failure)
{
	struct vm *vm;

	*failure = (struct vm_failure){ .code = -EINVAL, .step = VM_STEP_VCPU };
	if (vcpus == 0 || vcpus > VMM_VCPUS_MAX)
		return NULL;
	*failure = (struct vm_failure){ .code = -ENOMEM, .step = VM_STEP_ALLOCATE };
	vm = calloc(1, sizeof(*vm));
	if (!vm)
		return NULL;
	vm->fd = -1;
	vm->event_fd = event_fd;
	vm->ram = MAP_FAILED;
	vm->ram_size = ram_size;
	output_init(&vm->output);
	failure->code = vm_build(vm, kvm_fd, ram_fd, vcpus, &failure->step);
	if (failure->code == 0)
		return vm;
	vm_free(vm);
	return NULL;
}

void vm_free(struct vm *vm)
{
	for (uint32_t i = 0; i < vm->vcpu_count; i++)
		vcpu_close(&vm->vcpus[i]);
	for (uint32_t i = 0; i < vm->window_count; i++)
		window_release(&vm->windows[i]);
	if (vm->fd >= 0)
		close(vm->fd);
	if (vm->ram != MAP_FAILED)
		munmap(vm->ram, vm->ram_size);
	pthread_mutex_destroy(&vm->output.lock);
	free(vm);
}

int vm_ioeventfd(struct vm *vm, uint64_t address, uint32_t length, uint64_t datamatch, uint32_t flags, int fd)
{
	struct kvm_ioeventfd bell = { .addr = address, .len = length, .datamatch = datamatch, .fd = fd };

	if (flags & VM_BELL_PIO)
		bell.flags |= KVM_IOEVENTFD_FLAG_PIO;
	if (flags & VM_BELL_DATAMATCH)
		bell.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH;
	if (flags & VM_BELL_REMOVE)
		bell.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
	return ioctl(vm->fd, KVM_IOEVENTFD, &bell) < 0 ? -errno : 0;
}

int vm_irqfd(struct vm *vm, uint32_t gsi, int fd, int remove)
{
	struct kvm_irqfd irq = { .fd = (uint32_t)fd, .gsi = gsi, .flags = remove ? KVM_IRQFD_FLAG_DEASSIGN : 0 };

	return ioctl(vm->fd, KVM_IRQFD, &irq) < 0 ? -errno : 0;
}

int vm_hypercall_id(struct vm *vm, uint32_t connection_id, int fd, int remove)
{
	struct kvm_hyperv_eventfd bell = { .conn_id = connection_id, .fd = fd };

	if (remove)
		bell.flags = KVM_HYPERV_EVENTFD_DEASSIGN;
	return ioctl(vm->fd, KVM_HYPERV_EVENTFD, &bell) < 0 ? -errno : 0;
}

void vm_read_stats(struct vm *vm, struct vm_stats *out)
{
	memset(out, 0, sizeof(*out));
	for (uint32_t i = 0; i < vm->vcpu_count; i++) {
		struct vm_stats *s = &vm->vcpus[i].stats;

		out->exits += load_relaxed(&s->exits);
		out->handed_over += load_relaxed(&s->handed_over);
		out->served += load_relaxed(&s->served);
		out->pio += load_relaxed(&s->pio);
		out->unknown_mmio += load_relaxed(&s->unknown_mmio);
		out->unknown_pio += load_relaxed(&s->unknown_pio);
		out->refused_hypercalls += load_relaxed(&s->refused_hypercalls);
	}
	for (uint32_t i = 0; i < vm->window_count; i++)
		out->stray_notifies += window_strays(&vm->windows[i]);
	out->output_dropped = output_dropped(&vm->output);
}
