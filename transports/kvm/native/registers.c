/* The state in which vCPU 0 begins: PVH's entry for kernels, or 64-bit mode at once for small loops. */
#include "vmm.h"

#include <linux/kvm.h>
#include <sys/ioctl.h>

#define CR0_PE 0x1u
#define CR0_MP 0x2u
#define CR0_ET 0x10u
#define CR0_NE 0x20u
#define CR0_WP 0x10000u
#define CR0_PG 0x80000000u
#define CR4_PAE 0x20u
#define CR4_OSFXSR 0x200u
#define EFER_LME 0x100u
#define EFER_LMA 0x400u

#define SEGMENT_CODE 11 /* execute, read, accessed */
#define SEGMENT_DATA 3  /* read, write, accessed */
#define SEGMENT_BUSY_TSS 11

#define SELECTOR_CODE 0x08
#define SELECTOR_DATA 0x10
#define SELECTOR_TSS 0x18

#define RFLAGS_RESERVED 0x2

static struct kvm_segment flat(uint16_t selector, uint8_t type)
{
	return (struct kvm_segment){ .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .db = 1,
				     .s = 1, .g = 1 };
}

static void sregs_fill(struct kvm_sregs *s, const struct entry_state *state)
{
	s->cs = flat(SELECTOR_CODE, SEGMENT_CODE);
	s->ds = s->es = s->fs = s->gs = s->ss = flat(SELECTOR_DATA, SEGMENT_DATA);
	s->tr = (struct kvm_segment){ .limit = 0x67, .selector = SELECTOR_TSS, .type = SEGMENT_BUSY_TSS, .present = 1 };
	s->ldt = (struct kvm_segment){ .unusable = 1 };
	memset(&s->gdt, 0, sizeof(s->gdt));
	memset(&s->idt, 0, sizeof(s->idt));
	s->cr0 = CR0_PE | CR0_ET; /* Xen's start of day for PVH: protected mode, nothing else */
	s->cr2 = s->cr3 = s->cr4 = s->cr8 = 0;
	s->efer = 0;
	if (state->mode == VM_ENTER_LONG_MODE) {
		s->cs.l = 1;
		s->cs.db = 0;
		s->cr0 |= CR0_MP | CR0_NE | CR0_WP | CR0_PG;
		s->cr3 = state->cr3;
		s->cr4 = CR4_PAE | CR4_OSFXSR;
		s->efer = EFER_LME | EFER_LMA;
	}
}

int vm_enter_at(struct vm *vm, const struct entry_state *state)
{
	struct kvm_mp_state runnable = { .mp_state = KVM_MP_STATE_RUNNABLE };
	struct kvm_regs regs = { 0 };
	struct kvm_sregs sregs;
	int fd = vm->vcpus[0].fd;

	if (vm->threads)
		return VMM_E_RUNNING;
	if (ioctl(fd, KVM_GET_SREGS, &sregs) < 0)
		return -errno;
	sregs_fill(&sregs, state);
	memset(sregs.interrupt_bitmap, 0, sizeof(sregs.interrupt_bitmap));
	regs.rflags = RFLAGS_RESERVED;
	regs.rip = state->rip;
	regs.rbx = state->rbx;
	regs.rcx = state->rcx;
	regs.rdx = state->rdx;
	regs.rsi = state->rsi;
	regs.rdi = state->rdi;
	regs.rsp = state->rsp;
	if (ioctl(fd, KVM_SET_SREGS, &sregs) < 0 || ioctl(fd, KVM_SET_REGS, &regs) < 0)
		return -errno;
	return ioctl(fd, KVM_SET_MP_STATE, &runnable) < 0 ? -errno : 0;
}
