/*
 * What every file of the data plane begins with: the border, and accesses to shared words. The rooms, each with a header
 * of what it shows the others: memory/, then ring/, then worker/, then the native devices blk/ and net/. Everything is
 * hidden from Python except what border/ declares.
 */
#ifndef HYPERBELL_DATAPLANE_H
#define HYPERBELL_DATAPLANE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include "border/errors.cdef.h"
#include "border/memory.cdef.h"
#include "border/interrupt.cdef.h"
#include "border/ring.cdef.h"
#include "border/chain.cdef.h"
#include "border/blk.cdef.h"
#include "border/net.cdef.h"
#include "border/worker.cdef.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/*
 * Shared words: rings are shared with the guest, counters with Python. Every access to them is atomic, so that a
 * racing guest can make us read an old or a new value but never a torn or a repeated one.
 */
#define load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
/* Counters have one writer each, so a plain read-modify-write with relaxed accesses is enough. */
#define stat_add(p, n) store_relaxed((p), load_relaxed(p) + (n))

/* Rings and headers are little-endian (virtio 1.3, 1.4) and are read as they are. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the data plane is for little-endian machines");

/* Between two looks of a loop that polls: the other thread of this core goes first. */
static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	asm volatile("yield" : : : "memory");
#else
#error "which instruction of this processor waits inside a polling loop?"
#endif
}

static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
