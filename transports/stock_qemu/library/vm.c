/* A VM begins: whether it is given a key, which one, and the thread that reports to the daemon. */
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/random.h>

#include "preload.h"

/* The VM of a number that the process has given to another file since; its thread frees it. */
static void vm_end(struct vm *vm)
{
	for (unsigned int i = 0; i < VMS_MAX; i++)
		if (vms[i] == vm)
			vms[i] = NULL;
	vm->ended = true;
	vm_wake(vm);
}

/* Rule 2: whether there is a platform key, and which, is decided here, once, for all its vCPUs. */
static void vm_decide(struct vm *vm, const struct settings *settings)
{
	bool incoming = vm_is_incoming();

	vm->flags = incoming ? WIRE_VM_INCOMING : 0;
	if (kvm_ioctl(vm->fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_HYPERV_EVENTFD) <= 0) {
		vm->reason = WIRE_REASON_NO_CAPABILITY;
	} else if (settings->has_key) {
		vm->flags |= WIRE_VM_KEY_STABLE;
		vm->key = settings->key;
	} else if (settings->key_is_wrong) {
		vm->reason = WIRE_REASON_NO_KEY;
	} else if (incoming) {
		vm->reason = WIRE_REASON_INCOMING;
	} else {
		while (!vm->key && !vm->reason) {	/* 0 means "withheld" where devices tell K */
			if (getrandom(&vm->key, sizeof(vm->key), 0) != sizeof(vm->key))
				vm->reason = WIRE_REASON_NO_KEY;
			vm->key &= KEY_MASK;
		}
	}
}

void vm_created(int fd)
{
	const struct settings *settings;
	struct vm *vm, **place = NULL, *earlier;
	int reason = 0;

	pthread_mutex_lock(&state_lock);
	settings = settings_take();
	earlier = vm_by_fd(fd);
	if (earlier)
		vm_end(earlier);
	for (unsigned int i = 0; i < VMS_MAX && !place; i++)
		if (!vms[i])
			place = &vms[i];
	vm = settings->active && place ? calloc(1, sizeof(*vm)) : NULL;
	if (vm) {
		vm->fd = fd;
		vm->changed = true;
		vm_decide(vm, settings);
		reason = vm->reason;
		vm->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (vm->wake_fd >= 0 && link_start(vm, settings))
			*place = vm;
		else
			vm_free(vm);
	}
	pthread_mutex_unlock(&state_lock);
	if (reason)
		say_why(reason);
}
