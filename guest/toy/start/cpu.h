/* What C has no words for: ports, memory-mapped registers, CPUID, MSRs, interrupts on and off. */
#ifndef TOY_CPU_H
#define TOY_CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* An instruction at label ``from`` that faults goes on at ``to`` (interrupts.c: exception_handle). */
#define CPU_FIXUP(from, to)                                                                                            \
	".pushsection .fixups, \"a\"\n\t"                                                                              \
	".long " #from ", " #to "\n\t"                                                                                 \
	".popsection\n\t"

struct cpuid_leaf {
	uint32_t eax;
	uint32_t ebx;
	uint32_t ecx;
	uint32_t edx;
};

static inline void port_write8(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void port_write16(uint16_t port, uint16_t value)
{
	/* The doorbell: what the driver wrote to memory comes first. */
	asm volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

/* Plain moves, whatever the compiler would choose: some hosts decode them one by one. */
static inline uint32_t mmio_read32(uintptr_t address)
{
	uint32_t value;

	asm volatile("movl %1, %0" : "=r"(value) : "m"(*(volatile uint32_t *)address) : "memory");
	return value;
}

static inline uint16_t mmio_read16(uintptr_t address)
{
	uint16_t value;

	asm volatile("movw %1, %0" : "=r"(value) : "m"(*(volatile uint16_t *)address) : "memory");
	return value;
}

static inline uint8_t mmio_read8(uintptr_t address)
{
	uint8_t value;

	asm volatile("movb %1, %0" : "=q"(value) : "m"(*(volatile uint8_t *)address) : "memory");
	return value;
}

static inline void mmio_write32(uintptr_t address, uint32_t value)
{
	asm volatile("movl %1, %0" : "=m"(*(volatile uint32_t *)address) : "r"(value) : "memory");
}

static inline void mmio_write16(uintptr_t address, uint16_t value)
{
	asm volatile("movw %1, %0" : "=m"(*(volatile uint16_t *)address) : "r"(value) : "memory");
}

static inline void mmio_write8(uintptr_t address, uint8_t value)
{
	asm volatile("movb %1, %0" : "=m"(*(volatile uint8_t *)address) : "q"(value) : "memory");
}

#ifdef __x86_64__
static inline uint64_t mmio_read64(uintptr_t address)
{
	uint64_t value;

	asm volatile("movq %1, %0" : "=r"(value) : "m"(*(volatile uint64_t *)address) : "memory");
	return value;
}

static inline void mmio_write64(uintptr_t address, uint64_t value)
{
	asm volatile("movq %1, %0" : "=m"(*(volatile uint64_t *)address) : "r"(value) : "memory");
}
#endif

static inline struct cpuid_leaf cpuid_read(uint32_t number)
{
	struct cpuid_leaf leaf;

	asm volatile("cpuid" : "=a"(leaf.eax), "=b"(leaf.ebx), "=c"(leaf.ecx), "=d"(leaf.edx) : "a"(number), "c"(0));
	return leaf;
}

/* False: the processor refused (#GP), and the program goes on. */
static inline bool msr_read(uint32_t number, uint64_t *value)
{
	uint32_t failed = 1, low = 0, high = 0;

	asm volatile("1: rdmsr\n\t"
		     "movl $0, %0\n"
		     "2:\n\t" CPU_FIXUP(1b, 2b)
		     : "+r"(failed), "+a"(low), "+d"(high)
		     : "c"(number));
	*value = (uint64_t)high << 32 | low;
	return !failed;
}

static inline bool msr_write(uint32_t number, uint64_t value)
{
	uint32_t failed = 1;

	asm volatile("1: wrmsr\n\t"
		     "movl $0, %0\n"
		     "2:\n\t" CPU_FIXUP(1b, 2b)
		     : "+r"(failed)
		     : "c"(number), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
		     : "memory");
	return !failed;
}

static inline uint64_t time_stamp(void)
{
	uint32_t low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high));
	return (uint64_t)high << 32 | low;
}

static inline void interrupts_disable(void)
{
	asm volatile("cli" : : : "memory");
}

static inline void interrupts_enable(void)
{
	asm volatile("sti" : : : "memory");
}

/* No interrupt comes between the two: sti lets one more instruction pass. */
static inline void interrupts_enable_and_halt(void)
{
	asm volatile("sti\n\thlt" : : : "memory");
}

/* The rings are shared with another processor: a store before this is seen before a load after it. */
static inline void memory_barrier(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

#endif
