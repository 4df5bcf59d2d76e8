/* The processor's side of interrupts: IDT, local APIC with its timer, I/O APIC, and exceptions that are expected. */
#ifndef TOY_INTERRUPTS_H
#define TOY_INTERRUPTS_H

#include <stdbool.h>
#include <stdint.h>

#define INTERRUPT_HANDLERS 8

typedef void (*interrupt_handler)(void *argument);

/* Everything ready and interrupts on. ``patience_seconds`` bounds every wait below. */
int interrupts_start(uint32_t patience_seconds);

/* From now on an edge on pin ``gsi`` calls ``handler``. ``slot`` is the caller's own number below INTERRUPT_HANDLERS. */
int interrupts_attach(uint32_t slot, uint32_t gsi, interrupt_handler handler, void *argument);

/* Halt until ``*counter`` is no longer ``seen``: a handler counts there. False: patience is at its end. */
bool interrupts_wait(const volatile uint32_t *counter, uint32_t seen);

/* Halt for so many ticks of the timer, whatever else comes. */
void interrupts_pause(uint32_t ticks);

/* A deadline for loops that cannot halt: true while patience lasts. */
uint32_t interrupts_now(void);
bool interrupts_patient(uint32_t since);

#endif
