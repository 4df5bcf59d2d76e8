/* The way to KVM. A test has a KVM of its own in place of this file. */
#include <dlfcn.h>
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
