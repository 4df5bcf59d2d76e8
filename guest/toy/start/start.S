/*
 * From PVH's entry state to C, and from the processor's interrupts to C.
 *
 * A PVH loader finds the entry in the note XEN_ELFNOTE_PHYS32_ENTRY and enters in 32-bit protected mode, paging off,
 * flat segments, EBX = struct hvm_start_info. The 64-bit build goes on to long mode from there.
 */
#include "start/vectors.h"

#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define EFER 0xc0000080
#define EFER_LME 0x100
#define FLAG_IF 0x200

	.section .note.Xen, "a", @note
	.balign	4
	.long	4			/* of the name */
#ifdef __x86_64__
	.long	8			/* of the address */
#else
	.long	4
#endif
	.long	XEN_ELFNOTE_PHYS32_ENTRY
	.asciz	"Xen"
#ifdef __x86_64__
	.quad	start
#else
	.long	start
#endif

	.text
	.code32
	.globl	start
start:
	cld
	movl	$stack_top, %esp
	lgdt	gdt_pointer
	ljmp	$CODE_SELECTOR, $start_segments
start_segments:
	movl	$DATA_SELECTOR, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	%eax, %fs
	movl	%eax, %gs
#ifdef __x86_64__
	movl	%cr4, %eax
	orl	$CR4_PAE, %eax
	movl	%eax, %cr4
	movl	$page_map, %eax
	movl	%eax, %cr3
	movl	$EFER, %ecx
	rdmsr
	orl	$EFER_LME, %eax
	wrmsr
	movl	%cr0, %eax
	orl	$CR0_PG, %eax
	movl	%eax, %cr0
	ljmp	$CODE64_SELECTOR, $start_long
	.code64
start_long:
	movl	%ebx, %edi
	call	toy_main
#else
	pushl	%ebx
	call	toy_main
#endif

/*
 * One stub a vector, STUB_BYTES apart: they push what the processor did not (a code, where there is no error code) and
 * the vector's number.
 */
	.balign	STUB_BYTES
	.globl	interrupt_stubs
interrupt_stubs:
	.set	vector, 0
	.rept	VECTORS
	.balign	STUB_BYTES
	.if	!((ERROR_CODE_VECTORS >> vector) & (vector < 32))
	push	$0
	.endif
	push	$vector
	jmp	interrupt_common
	.set	vector, vector + 1
	.endr

/* The stack is now a struct interrupt_frame from its member ``vector`` on. */
interrupt_common:
	cld
#ifdef __x86_64__
	push	%rax
	push	%rcx
	push	%rdx
	push	%rbx
	push	%rbp
	push	%rsi
	push	%rdi
	push	%r8
	push	%r9
	push	%r10
	push	%r11
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	movq	%rsp, %rdi
	call	interrupt_dispatch
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%r11
	pop	%r10
	pop	%r9
	pop	%r8
	pop	%rdi
	pop	%rsi
	pop	%rbp
	pop	%rbx
	pop	%rdx
	pop	%rcx
	pop	%rax
	addq	$16, %rsp
	iretq
#else
	push	%eax
	push	%ecx
	push	%edx
	push	%ebx
	push	%ebp
	push	%esi
	push	%edi
	push	%esp			/* as it was before this push: where the frame begins */
	call	interrupt_dispatch
	addl	$4, %esp
	pop	%edi
	pop	%esi
	pop	%ebp
	pop	%ebx
	pop	%edx
	pop	%ecx
	pop	%eax
	addl	$8, %esp
	/*
	 * The work of iret within one privilege level, without it: hosts that emulate 32-bit code (one kind of
	 * /dev/kvm) know iret in real mode only. On the stack: address, selector, flags. sti lets ret pass before an
	 * interrupt comes.
	 */
	testl	$FLAG_IF, 8(%esp)
	jz	return_disabled
	pushl	8(%esp)
	andl	$~FLAG_IF, (%esp)
	popfl
	sti
	ret	$8
return_disabled:
	pushl	8(%esp)
	popfl
	ret	$8
#endif

	.section .rodata
	.balign	8
gdt:
	.quad	0
	.quad	0x00cf9b000000ffff	/* CODE_SELECTOR: 32-bit code */
	.quad	0x00cf93000000ffff	/* DATA_SELECTOR */
	.quad	0x00af9b000000ffff	/* CODE64_SELECTOR: 64-bit code */
gdt_pointer:
	.word	gdt_pointer - gdt - 1
	.long	gdt, 0

#ifdef __x86_64__
/* Four gibibytes, each address to itself by pages of 2 MiB; the last, where the devices are, uncached (PCD). */
#define PAGE_TABLE 0x03
#define PAGE_CACHED 0x83
#define PAGE_UNCACHED 0x93
	.data
	.balign	4096
page_map:
	.quad	page_pointers + PAGE_TABLE
	.fill	511, 8, 0
page_pointers:
	.quad	page_directories + PAGE_TABLE
	.quad	page_directories + 0x1000 + PAGE_TABLE
	.quad	page_directories + 0x2000 + PAGE_TABLE
	.quad	page_directories + 0x3000 + PAGE_TABLE
	.fill	508, 8, 0
page_directories:
	.set	page, 0
	.rept	1536
	.quad	page + PAGE_CACHED
	.set	page, page + 0x200000
	.endr
	.rept	512
	.quad	page + PAGE_UNCACHED
	.set	page, page + 0x200000
	.endr
#endif

	.bss
	.balign	16
	.skip	16384
stack_top:

	.section .note.GNU-stack, "", @progbits
