/* The VMs of this process, what there is to report of them, and the one lock around all of it. Every caller holds it. */
#include <stdlib.h>
#include <unistd.h>

#include "preload.h"

pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER;

struct vm *vms[VMS_MAX];

struct vm *vm_by_fd(int fd)
{
	for (unsigned int i = 0; i < VMS_MAX; i++)
		if (vms[i] && vms[i]->fd == fd)
			return vms[i];
	return NULL;
}

void vm_wake(struct vm *vm)
{
	uint64_t one = 1;
	ssize_t written = write(vm->wake_fd, &one, sizeof(one));

	(void)written;	/* EAGAIN: it is awake */
}

void close_if_open(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

void vm_free(struct vm *vm)
{
	for (unsigned int i = 0; i < vm->bell_count; i++)
		close_if_open(&vm->bells[i].fd);
	for (unsigned int i = 0; i < vm->vcpu_count; i++)
		close_if_open(&vm->vcpus[i].stats_fd);
	close_if_open(&vm->wake_fd);
	free(vm->vcpus);
	free(vm);
}

/* A new daemon, or the old one again, knows nothing: everything is to be reported. */
void vm_forget_reports(struct vm *vm)
{
	vm->changed = true;
	for (unsigned int i = 0; i < vm->vcpu_count; i++)
		vm->vcpus[i].reported = false;
	for (unsigned int i = 0; i < vm->bell_count; i++) {
		struct bell *bell = &vm->bells[i];

		bell->used &= bell->fd >= 0;
		bell->reported = bell->answering = false;
		bell->changed = bell->used;
	}
}
