/*
 * How the VM ended: the first vCPU whose guest ends the VM, or cannot be run, writes the reason, and Python reads it.
 * What counts as an end is decided in exits.c.
 */
#include "vmm.h"

void vm_end_with(struct vcpu *v, const struct vm_end *end)
{
	struct vm *vm = v->vm;
	uint32_t open = 0;

	if (__atomic_compare_exchange_n(&vm->ended, &open, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
		vm->end = *end;
		vm->end.vcpu = v->index;
		store_release(&vm->ended, 2);
	}
	wake(vm->event_fd);
}

void vm_read_end(struct vm *vm, struct vm_end *out)
{
	if (load_acquire(&vm->ended) == 2)
		*out = vm->end;
	else
		*out = (struct vm_end){ .kind = VM_END_NONE };
}
