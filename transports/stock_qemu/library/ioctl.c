/* The one symbol that others see: ioctl(), with KVM's calls looked at on their way. */
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload.h"

typedef int ioctl_function(int fd, unsigned long request, ...);

/* The ioctl() behind ours. Looked up at the first call, not in a constructor: nothing of ours runs before. */
int kvm_ioctl(int fd, unsigned long request, void *argument)
{
	static _Atomic(ioctl_function *) next;
	ioctl_function *function = atomic_load_explicit(&next, memory_order_relaxed);

	if (!function) {
		function = (ioctl_function *)dlsym(RTLD_NEXT, "ioctl");
		if (!function)
			return (int)syscall(SYS_ioctl, fd, request, argument);
		atomic_store_explicit(&next, function, memory_order_relaxed);
	}
	return function(fd, request, argument);
}

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
