/* Interrupts and exceptions: tables, the local APIC and its timer, the I/O APIC, and the waits that interrupts end. */
#include "start/interrupts.h"

#include "start/cpu.h"
#include "start/report.h"
#include "start/vectors.h"

#define LAPIC 0xfee00000u
#define LAPIC_ID 0x020
#define LAPIC_TPR 0x080
#define LAPIC_EOI 0x0b0
#define LAPIC_SPURIOUS 0x0f0
#define LAPIC_ENABLED 0x100
#define LAPIC_TIMER 0x320
#define LAPIC_TIMER_PERIODIC 0x20000
#define LAPIC_LINT0 0x350
#define LAPIC_MASKED 0x10000
#define LAPIC_INITIAL 0x380
#define LAPIC_DIVIDE 0x3e0
#define LAPIC_DIVIDE_BY_1 0xb

/* The timer's clock is 1 GHz under KVM and under QEMU's TCG: the ticks are meant for bounds, not for measuring. */
#define TICKS_PER_SECOND 20u
#define TIMER_CLOCK 1000000000u
#define FIRST_TICK 1000000u /* clocks: a first, short one shows that the timer works */
/* Time stamps, some seconds: an emulator ticks by a thread of its own, which a busy machine lets wait. */
#define FIRST_TICK_PATIENCE 10000000000ull

#define IOAPIC 0xfec00000u
#define IOAPIC_DATA 0x10
#define IOAPIC_VERSION 1
#define IOAPIC_PIN_LOW(pin) (0x10 + 2 * (pin))
#define IOAPIC_PIN_HIGH(pin) (0x11 + 2 * (pin))

#define PORT_PIC1_MASK 0x21
#define PORT_PIC2_MASK 0xa1

#define EXCEPTIONS 32
#define GATE_INTERRUPT 0x8e

#ifdef __x86_64__
#define SAVED_REGISTERS 15
#define GATE_CODE CODE64_SELECTOR
#else
#define SAVED_REGISTERS 7
#define GATE_CODE CODE_SELECTOR
#endif

/* As start.S and the processor push it, from the last to the first. */
struct interrupt_frame {
	unsigned long registers[SAVED_REGISTERS];
	unsigned long vector;
	unsigned long error;
	unsigned long ip;
	unsigned long cs;
	unsigned long flags;
};

struct gate {
	uint16_t offset_low;
	uint16_t selector;
	uint8_t stack;
	uint8_t type;
	uint16_t offset_middle;
#ifdef __x86_64__
	uint32_t offset_high;
	uint32_t reserved;
#endif
};

struct table_pointer {
	uint16_t limit;
	unsigned long base;
} __attribute__((packed));

struct fixup {
	uint32_t from;
	uint32_t to;
};

extern const char interrupt_stubs[];
extern const struct fixup fixups_begin[], fixups_end[];

void interrupt_dispatch(struct interrupt_frame *frame);

static struct gate idt[VECTORS];
static struct {
	interrupt_handler handler;
	void *argument;
} handlers[INTERRUPT_HANDLERS];
static volatile uint32_t ticks;
static uint32_t patience;

static void lapic_write(uint32_t register_offset, uint32_t value)
{
	mmio_write32(LAPIC + register_offset, value);
}

static uint32_t ioapic_read(uint32_t index)
{
	mmio_write32(IOAPIC, index);
	return mmio_read32(IOAPIC + IOAPIC_DATA);
}

static void ioapic_write(uint32_t index, uint32_t value)
{
	mmio_write32(IOAPIC, index);
	mmio_write32(IOAPIC + IOAPIC_DATA, value);
}

static void exception_handle(struct interrupt_frame *frame)
{
	const struct fixup *fixup;

	for (fixup = fixups_begin; fixup < fixups_end; fixup++) {
		if (fixup->from == frame->ip) {
			frame->ip = fixup->to;
			return;
		}
	}
	report_error("exception %u (error code 0x%x) at address 0x%x", (uint32_t)frame->vector, (uint32_t)frame->error,
		     (uint32_t)frame->ip);
	report_exit();
}

void interrupt_dispatch(struct interrupt_frame *frame)
{
	uint32_t slot = (uint32_t)frame->vector - VECTOR_DEVICE;

	if (frame->vector < EXCEPTIONS) {
		exception_handle(frame);
		return;
	}
	if (frame->vector == VECTOR_SPURIOUS) /* the local APIC's own: it wants no EOI */
		return;
	if (frame->vector == VECTOR_TIMER)
		ticks++;
	else if (slot < INTERRUPT_HANDLERS && handlers[slot].handler)
		handlers[slot].handler(handlers[slot].argument);
	else
		report_error("an interrupt came on vector %u, which nobody asked for", (uint32_t)frame->vector);
	lapic_write(LAPIC_EOI, 0);
}

static void idt_load(void)
{
	struct table_pointer pointer = { sizeof(idt) - 1, (unsigned long)idt };
	uint32_t vector;

	for (vector = 0; vector < VECTORS; vector++) {
		/* The program lies below 4 GiB: offset_high stays 0. */
		uint32_t stub = (uint32_t)(uintptr_t)interrupt_stubs + vector * STUB_BYTES;

		idt[vector].offset_low = (uint16_t)stub;
		idt[vector].selector = GATE_CODE;
		idt[vector].type = GATE_INTERRUPT;
		idt[vector].offset_middle = (uint16_t)(stub >> 16);
	}
	asm volatile("lidt %0" : : "m"(pointer));
}

static void timer_start(uint32_t clocks, uint32_t mode)
{
	lapic_write(LAPIC_DIVIDE, LAPIC_DIVIDE_BY_1);
	lapic_write(LAPIC_TIMER, VECTOR_TIMER | mode);
	lapic_write(LAPIC_INITIAL, clocks);
}

int interrupts_start(uint32_t patience_seconds)
{
	uint64_t since = time_stamp();

	patience = patience_seconds * TICKS_PER_SECOND;
	idt_load();
	port_write8(PORT_PIC1_MASK, 0xff);
	port_write8(PORT_PIC2_MASK, 0xff);
	lapic_write(LAPIC_TPR, 0);
	lapic_write(LAPIC_LINT0, LAPIC_MASKED);
	lapic_write(LAPIC_SPURIOUS, LAPIC_ENABLED | VECTOR_SPURIOUS);
	interrupts_enable();
	timer_start(FIRST_TICK, 0);
	/* All later waits halt, and rely on the timer to wake up from a wait for what never comes. */
	while (!ticks) {
		if (time_stamp() - since > FIRST_TICK_PATIENCE)
			return report_error("the local APIC's timer does not tick");
	}
	timer_start(TIMER_CLOCK / TICKS_PER_SECOND, LAPIC_TIMER_PERIODIC);
	return 0;
}

int interrupts_attach(uint32_t slot, uint32_t gsi, interrupt_handler handler, void *argument)
{
	uint32_t pins = (ioapic_read(IOAPIC_VERSION) >> 16 & 0xff) + 1;

	if (gsi >= pins)
		return report_error("interrupt %u: the I/O APIC has %u pins", gsi, pins);
	handlers[slot].handler = handler;
	handlers[slot].argument = argument;
	ioapic_write(IOAPIC_PIN_HIGH(gsi), mmio_read32(LAPIC + LAPIC_ID)); /* both have the id in the top byte */
	/* Fixed delivery, physical destination, active high, edge, not masked: all zero. */
	ioapic_write(IOAPIC_PIN_LOW(gsi), VECTOR_DEVICE + slot);
	return 0;
}

bool interrupts_wait(const volatile uint32_t *counter, uint32_t seen)
{
	uint32_t begin = ticks;

	for (;;) {
		interrupts_disable();
		if (*counter != seen || ticks - begin >= patience)
			break;
		interrupts_enable_and_halt();
	}
	interrupts_enable();
	return *counter != seen;
}

void interrupts_pause(uint32_t count)
{
	uint32_t begin = ticks;

	while (ticks - begin < count) {
		interrupts_disable();
		interrupts_enable_and_halt();
	}
}

uint32_t interrupts_now(void)
{
	return ticks;
}

bool interrupts_patient(uint32_t since)
{
	return ticks - since < patience;
}
