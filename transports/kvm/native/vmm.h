/*
 * Internals of the virtual machine. Everything here is hidden from Python except what vmm.cdef.h declares.
 *
 * Calls go one way: vm.c (the machine) -> vcpu.c (a thread each) -> exits.c -> window.c, ending.c, handover.c, output.c
 * -> threads.c. Beside them acknowledger.c and ring_guest.c measure doorbells.
 */
#ifndef HYPERBELL_VMM_H
#define HYPERBELL_VMM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "vmm.cdef.h"

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#define load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
/* Counters of a vCPU have one writer, its thread. */
#define stat_add(p, n) store_relaxed((p), load_relaxed(p) + (n))

struct kvm_run;

/* ---- threads.c ---- */

/* Ring an eventfd. */
void wake(int event_fd);
/* A thread called `name` that takes no signals; 0 or a negated errno. */
int thread_start(pthread_t *thread, void *(*main)(void *), void *argument, const char *name);

/* ---- handover.c: one register access, from a vCPU's thread to Python and back ---- */

enum handover_state {
	HANDOVER_IDLE,      /* the vCPU's thread owns the slot */
	HANDOVER_ASKED,     /* Python is to take it */
	HANDOVER_TAKEN,     /* Python works on it */
	HANDOVER_ANSWERED,  /* the vCPU's thread is to go on */
	HANDOVER_ABANDONED, /* the VM stops: nobody waits and nobody asks any more */
};

struct handover {
	uint32_t state; /* atomic, and a futex; its release and acquire order the access */
	struct access access;
};

void handover_reset(struct handover *h);
/* The vCPU's thread: ask, tell `event_fd`, wait. False: abandoned; else access.data is the answer. */
bool handover_ask(struct handover *h, int event_fd);
/* The other side. */
bool handover_take(struct handover *h, struct access *out);
void handover_answer(struct handover *h, uint64_t data);
void handover_abandon(struct handover *h);

/* ---- output.c: bytes of all vCPUs to Python, bounded ---- */

#define OUTPUT_BYTES (64 * 1024) /* all that Linux says while it boots */

struct output {
	pthread_mutex_t lock;
	uint32_t head, tail; /* free-running; head is where the next byte goes */
	bool told;           /* Python was woken and has not found it empty since */
	uint64_t dropped;
	uint8_t bytes[OUTPUT_BYTES];
};

void output_init(struct output *o);
/* True: wake Python. */
bool output_put(struct output *o, const uint8_t *bytes, uint32_t count);
uint32_t output_take(struct output *o, uint8_t *buffer, uint32_t capacity);
uint64_t output_dropped(struct output *o);

/* ---- window.c: where devices are ---- */

struct window {
	uint64_t gpa, size;
	uint32_t *interrupt_status; /* atomic, shared with the device; or NULL */
	uint32_t notify_port;
	uint32_t index;
	uint64_t strays;            /* atomic: any vCPU */
	pthread_mutex_t lock;       /* of kicks: a kick is not closed while it is written */
	int kicks[VMM_QUEUES_MAX];
};

struct window *window_at(struct vm *vm, uint64_t gpa, uint32_t length);
struct window *window_of_port(struct vm *vm, uint32_t port);
/* True: rung; false: a stray, counted. */
bool window_notify(struct window *w, uint32_t queue);
/* A register that needs no Python; false: hand it over. */
bool window_serve(struct window *w, uint32_t offset, bool is_write, uint32_t *value);
void window_release(struct window *w);

/* ---- the machine itself, and a vCPU: of which every file may know ---- */

struct vcpu {
	struct vm *vm;
	uint32_t index;
	int fd;
	struct kvm_run *run;
	pthread_t thread;
	struct handover handover;
	struct vm_stats stats; /* written by its thread; output_dropped and stray_notifies are kept elsewhere */
};

struct vm {
	int fd, event_fd;
	uint8_t *ram;
	uint64_t ram_size;
	uint32_t run_size;    /* of a vCPU's struct kvm_run */
	uint32_t vcpu_count, window_count;
	uint32_t stopping;    /* atomic */
	uint32_t running;     /* atomic: threads */
	uint32_t threads;     /* Python's: how many there are to join */
	uint8_t serial_lcr;   /* atomic: the serial port's line control register */
	uint32_t ended;       /* atomic: 0; 1: a vCPU is writing `end`; 2: it is written */
	struct vm_end end;
	struct output output;
	struct window windows[VMM_WINDOWS_MAX];
	struct vcpu vcpus[VMM_VCPUS_MAX];
};

/* ---- ending.c ---- */

/* The first reason counts. */
void vm_end_with(struct vcpu *v, const struct vm_end *end);

/* ---- exits.c ---- */

/* What the exit asks for; false: this vCPU runs no more. */
bool exit_serve(struct vcpu *v);
/* KVM_RUN itself failed. */
void exit_failed(struct vcpu *v, int error);

/* ---- vcpu.c ---- */

int vcpu_open(struct vm *vm, uint32_t index, uint32_t *step);
void vcpu_close(struct vcpu *v);

#endif
