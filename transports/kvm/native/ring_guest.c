/*
 * The guest that measures doorbells: position-independent 64-bit code that Python copies into a VM's memory, enters in
 * long mode, and gives a list of steps. It rings, and notes for each ring how long the vCPU was away by the time stamp
 * counter. It has no stack, takes no interrupt and cannot fault: every address it touches is in the step.
 */
#include "vmm.h"

#include <cpuid.h>

/* What the assembly knows of struct ring_step. */
#define OFFSETS \
	".set STEP_KIND, 0\n" \
	".set STEP_COUNT, 8\n" \
	".set STEP_ADDRESS, 16\n" \
	".set STEP_VALUE, 24\n" \
	".set STEP_SAMPLES, 32\n" \
	".set STEP_ACK, 40\n" \
	".set STEP_PAUSE, 48\n" \
	".set STEP_PATIENCE, 56\n" \
	".set STEP_DONE, 64\n" \
	".set STEP_REFUSED, 72\n" \
	".set STEP_STATUS, 80\n" \
	".set STEP_UNANSWERED, 88\n" \
	".set STEP_BEGIN, 96\n" \
	".set STEP_END, 104\n" \
	".set STEP_SIZE, 112\n"

_Static_assert(offsetof(struct ring_step, kind) == 0, "STEP_KIND");
_Static_assert(offsetof(struct ring_step, count) == 8, "STEP_COUNT");
_Static_assert(offsetof(struct ring_step, address) == 16, "STEP_ADDRESS");
_Static_assert(offsetof(struct ring_step, value) == 24, "STEP_VALUE");
_Static_assert(offsetof(struct ring_step, samples_gpa) == 32, "STEP_SAMPLES");
_Static_assert(offsetof(struct ring_step, ack_gpa) == 40, "STEP_ACK");
_Static_assert(offsetof(struct ring_step, pause) == 48, "STEP_PAUSE");
_Static_assert(offsetof(struct ring_step, patience) == 56, "STEP_PATIENCE");
_Static_assert(offsetof(struct ring_step, done) == 64, "STEP_DONE");
_Static_assert(offsetof(struct ring_step, refused) == 72, "STEP_REFUSED");
_Static_assert(offsetof(struct ring_step, status) == 80, "STEP_STATUS");
_Static_assert(offsetof(struct ring_step, unanswered) == 88, "STEP_UNANSWERED");
_Static_assert(offsetof(struct ring_step, begin) == 96, "STEP_BEGIN");
_Static_assert(offsetof(struct ring_step, end) == 104, "STEP_END");
_Static_assert(sizeof(struct ring_step) == 112, "STEP_SIZE");
/* The loops compare kinds with these numbers. */
_Static_assert(RING_NOTHING == 0 && RING_CPUID == 1 && RING_OUT == 2 && RING_STORE == 3, "kinds");
_Static_assert(RING_VMCALL == 4 && RING_VMMCALL == 5 && RING_WRMSR == 6 && RING_LOOP == 7, "kinds");

extern const uint8_t ring_guest_begin[], ring_guest_end[];
extern uint64_t ring_guest_loop(uint64_t iterations);

/* clang-format off */
__asm__(
OFFSETS
/*
 * rdi: the step; rsi: steps left, this one included. Within a step:
 * r12: where the next sample goes; r13: rings left; r14: address, port, connection id; r15: value; rbp: acknowledgement
 * r9: what the acknowledgement must reach; r10, r11: the two time stamps; rbx: the hypercall's status, else 0
 */
"	.macro ticks\n"          /* rax: the time stamp counter */
"	rdtsc\n"
"	shlq	$32, %rdx\n"
"	orq	%rdx, %rax\n"
"	.endm\n"
"	.macro stamp register\n"
"	lfence\n"                /* what came before is done, and what comes after has not begun */
"	ticks\n"
"	lfence\n"
"	movq	%rax, \\register\n"
"	.endm\n"

"	.macro ring_nothing\n"
"	.endm\n"
"	.macro ring_cpuid\n"     /* always intercepted, and answered in the kernel: the cheapest exit there is */
"	xorl	%eax, %eax\n"
"	xorl	%ecx, %ecx\n"
"	cpuid\n"
"	xorl	%ebx, %ebx\n"
"	.endm\n"
"	.macro ring_out\n"
"	movl	%r14d, %edx\n"
"	movl	%r15d, %eax\n"
"	outw	%ax, %dx\n"
"	.endm\n"
"	.macro ring_store\n"
"	movl	%r15d, (%r14)\n"
"	.endm\n"
"	.macro ring_hypercall instruction\n" /* DOORBELLS: HvCallSignalEvent, fast; no hypercall of KVM has RAX's number */
"	movl	$0x1005d, %ecx\n"
"	movq	%r14, %rdx\n"
"	xorl	%r8d, %r8d\n"
"	movl	$0x7fffffff, %eax\n"
"	\\instruction\n"
"	movq	%rax, %rbx\n"
"	.endm\n"
"	.macro ring_vmcall\n"
"	ring_hypercall vmcall\n"
"	.endm\n"
"	.macro ring_vmmcall\n"
"	ring_hypercall vmmcall\n"
"	.endm\n"
"	.macro ring_wrmsr\n"     /* not a ring: the guest's operating system id, without which nobody speaks Hyper-V */
"	movl	%r14d, %ecx\n"
"	movq	%r15, %rax\n"
"	movq	%r15, %rdx\n"
"	shrq	$32, %rdx\n"
"	wrmsr\n"
"	.endm\n"
"	.macro ring_loop\n"      /* how fast plain instructions are */
"	movq	%r14, %rcx\n"
"8:	decq	%rcx\n"
"	jnz	8b\n"
"	.endm\n"

/* One loop a kind, so that nothing is decided between the two time stamps. */
"	.macro rings kind, ring\n"
"	cmpq	$\\kind, STEP_KIND(%rdi)\n"
"	jne	9f\n"
"1:	testq	%r13, %r13\n"
"	jz	.Lstep_ends\n"
"	decq	%r13\n"
"	testq	%rbp, %rbp\n"
"	jz	2f\n"
"	ticks\n"                 /* the thread is to sleep again before it is rung */
"	movq	%rax, %r10\n"
"5:	ticks\n"
"	subq	%r10, %rax\n"
"	cmpq	STEP_PAUSE(%rdi), %rax\n"
"	jb	5b\n"
"	incq	8(%rbp)\n"       /* how often the waiting thread was rung in all, as the guest counts */
"	movq	8(%rbp), %r9\n"
"2:	stamp	%r10\n"
"	\\ring\n"
"	testq	%rbx, %rbx\n"
"	jnz	6f\n"
"	testq	%rbp, %rbp\n"
"	jz	4f\n"
"3:	cmpq	%r9, (%rbp)\n"
"	jae	4f\n"
"	ticks\n"                 /* no `pause`: a long row of them would be an exit of its own */
"	subq	%r10, %rax\n"
"	cmpq	STEP_PATIENCE(%rdi), %rax\n"
"	jb	3b\n"
"	incq	STEP_UNANSWERED(%rdi)\n"
"	jmp	.Lstep_ends\n"
"4:	stamp	%r11\n"
"	subq	%r10, %r11\n"
"	movq	%r11, (%r12)\n"
"	addq	$8, %r12\n"
"	incq	STEP_DONE(%rdi)\n"
"	jmp	1b\n"
"6:	incq	STEP_REFUSED(%rdi)\n"
"	movq	%rbx, STEP_STATUS(%rdi)\n"
"	xorl	%ebx, %ebx\n"
"	testq	%rbp, %rbp\n"
"	jz	1b\n"
"	decq	8(%rbp)\n"       /* it was not rung */
"	jmp	1b\n"
"9:\n"
"	.endm\n"

"	.text\n"
"	.balign	64\n"
"	.globl	ring_guest_begin, ring_guest_end, ring_guest_loop\n"
"	.hidden	ring_guest_begin, ring_guest_end, ring_guest_loop\n"
"ring_guest_begin:\n"
"	xorl	%ebx, %ebx\n"
"	movq	STEP_COUNT(%rdi), %r13\n"
"	movq	STEP_ADDRESS(%rdi), %r14\n"
"	movq	STEP_VALUE(%rdi), %r15\n"
"	movq	STEP_SAMPLES(%rdi), %r12\n"
"	movq	STEP_ACK(%rdi), %rbp\n"
"	stamp	%r10\n"
"	movq	%r10, STEP_BEGIN(%rdi)\n"
"	rings	0, ring_nothing\n"
"	rings	1, ring_cpuid\n"
"	rings	2, ring_out\n"
"	rings	3, ring_store\n"
"	rings	4, ring_vmcall\n"
"	rings	5, ring_vmmcall\n"
"	rings	6, ring_wrmsr\n"
"	rings	7, ring_loop\n"
".Lstep_ends:\n"
"	stamp	%r11\n"
"	movq	%r11, STEP_END(%rdi)\n"
"	addq	$STEP_SIZE, %rdi\n"
"	decq	%rsi\n"
"	jnz	ring_guest_begin\n"
"	xorl	%eax, %eax\n"
"	movl	$0xf4, %edx\n"
"	outb	%al, %dx\n"
"7:	hlt\n"
"	jmp	7b\n"
"ring_guest_end:\n"

/* The guest's loop once more, for this process to run: uint64_t ring_guest_loop(uint64_t iterations), in cycles. */
"	.balign	64\n"
"ring_guest_loop:\n"
"	.type	ring_guest_loop, @function\n"
"	pushq	%r14\n"
"	movq	%rdi, %r14\n"
"	stamp	%r10\n"
"	ring_loop\n"
"	stamp	%r11\n"
"	subq	%r10, %r11\n"
"	movq	%r11, %rax\n"
"	popq	%r14\n"
"	ret\n"
"	.size	ring_guest_loop, . - ring_guest_loop\n"
);
/* clang-format on */

const uint8_t *ring_guest_code(void)
{
	return ring_guest_begin;
}

uint64_t ring_guest_size(void)
{
	return (uint64_t)(ring_guest_end - ring_guest_begin);
}

uint64_t host_loop(uint64_t iterations)
{
	return iterations ? ring_guest_loop(iterations) : 0;
}

void host_cpuid(uint32_t leaf, uint32_t subleaf, struct cpuid_entry *out)
{
	*out = (struct cpuid_entry){ .leaf = leaf, .subleaf = subleaf };
	__cpuid_count(leaf, subleaf, out->eax, out->ebx, out->ecx, out->edx);
}
