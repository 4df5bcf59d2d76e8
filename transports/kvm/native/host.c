/* What this machine's /dev/kvm can do, before any VM is made. */
#include "vmm.h"

#include <linux/kvm.h>
#include <stdlib.h>
#include <sys/ioctl.h>

static int extension(int kvm_fd, long number)
{
	int value = ioctl(kvm_fd, KVM_CHECK_EXTENSION, number);

	return value < 0 ? 0 : value;
}

int kvm_probe(int kvm_fd, struct kvm_abilities *out)
{
	int version = ioctl(kvm_fd, KVM_GET_API_VERSION, 0);

	if (version < 0)
		return -errno;
	memset(out, 0, sizeof(*out));
	out->api_version = version;
	out->user_memory = extension(kvm_fd, KVM_CAP_USER_MEMORY);
	out->irqchip = extension(kvm_fd, KVM_CAP_IRQCHIP);
	out->pit = extension(kvm_fd, KVM_CAP_PIT2);
	out->irqfd = extension(kvm_fd, KVM_CAP_IRQFD);
	out->ioeventfd = extension(kvm_fd, KVM_CAP_IOEVENTFD);
	out->ioeventfd_any_length = extension(kvm_fd, KVM_CAP_IOEVENTFD_ANY_LENGTH);
	out->immediate_exit = extension(kvm_fd, KVM_CAP_IMMEDIATE_EXIT);
	out->hyperv_eventfd = extension(kvm_fd, KVM_CAP_HYPERV_EVENTFD);
	out->tsc_deadline = extension(kvm_fd, KVM_CAP_TSC_DEADLINE_TIMER);
	out->vcpus_max = extension(kvm_fd, KVM_CAP_MAX_VCPUS);
	return 0;
}

int kvm_supported_cpuid(int kvm_fd, struct cpuid_entry *entries, uint32_t capacity)
{
	struct kvm_cpuid2 *cpuid;
	int count;

	cpuid = calloc(1, sizeof(*cpuid) + capacity * sizeof(cpuid->entries[0]));
	if (!cpuid)
		return -ENOMEM;
	cpuid->nent = capacity;
	count = ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid) < 0 ? -errno : (int)cpuid->nent;
	for (int i = 0; i < count; i++) {
		const struct kvm_cpuid_entry2 *e = &cpuid->entries[i];

		entries[i] = (struct cpuid_entry){ e->function, e->index, e->flags, e->eax, e->ebx, e->ecx, e->edx };
	}
	free(cpuid);
	return count;
}
