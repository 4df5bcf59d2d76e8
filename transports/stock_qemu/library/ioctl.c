/* The one symbol that others see: ioctl(), with KVM's calls looked at on their way. */
#include <errno.h>
#include <stdarg.h>

#include "preload.h"

__attribute__((visibility("default"))) int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;
	int result, error;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);

	/* The kernel looks at 32 bits; an int of QEMU's may have come with its sign in the others. */
	if ((unsigned int)request == KVM_SET_CPUID2 && argument)
		return vcpu_set_cpuid(fd, argument);
	result = kvm_ioctl(fd, request, argument);
	if (result < 0)
		return result;
	error = errno;
	switch ((unsigned int)request) {
	case KVM_CREATE_VM:
		vm_created(result);
		break;
	case KVM_CREATE_VCPU:
		vcpu_created(fd, result, (uint32_t)(uintptr_t)argument);
		break;
	case KVM_SET_MSRS:
		vcpu_msrs_set(fd, argument);
		break;
	case KVM_IOEVENTFD:
		ioeventfd_changed(fd, argument);
		break;
	}
	errno = error;
	return result;
}
