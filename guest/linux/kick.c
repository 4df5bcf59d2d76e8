// SPDX-License-Identifier: GPL-2.0
/*
 * The fast path: one look into the table, one hypercall, two counters. It is entered with interrupts off, from
 * softirqs and on several CPUs at once, perhaps under a console's or the scheduler's locks: it takes no lock,
 * allocates nothing and prints nothing.
 */
#include <linux/compiler.h>
#include <linux/irq_work.h>
#include <linux/preempt.h>

#include <asm/asm.h>
#include <asm/cpufeature.h>

#include "compat.h"
#include "hyperbell.h"

#define HB_SIGNAL_EVENT_FAST	(HVCALL_SIGNAL_EVENT | HV_HYPERCALL_FAST_BIT)
#define HB_NO_KVM_CALL		0x7fffffffULL	/* a KVM without Hyper-V reads RAX, and knows no call of this number */
#define HB_FAULTED		0xffffULL	/* the instruction was #UD: no hypervisor answers it */

DEFINE_PER_CPU(struct hb_totals, hb_totals);

static void hb_refused(struct irq_work *work)
{
	hb_scan_soon();
}

/* A timer must not be set under any lock that the kick may come with; an irq_work may be queued always. */
static DEFINE_IRQ_WORK(hb_refused_work, hb_refused);

/* SIGNAL_EVENT, fast: RCX = control word, RDX = connection id, R8 = event flag 0. Any answer but 0 is "not rung". */
static __always_inline u64 hb_signal(u32 id)
{
	register u64 flag asm("r8") = 0;
	u64 control = HB_SIGNAL_EVENT_FAST, input = id, status = HB_NO_KVM_CALL;

	if (boot_cpu_has(X86_FEATURE_VMMCALL))
		asm volatile("1: vmmcall\n"
			     "	jmp 3f\n"
			     "2: mov %[faulted], %%rax\n"
			     "3:\n" _ASM_EXTABLE(1b, 2b)
			     : "+a"(status), "+c"(control), "+d"(input), "+r"(flag)
			     : [faulted] "i"(HB_FAULTED)
			     : "r9", "r10", "r11", "cc", "memory");
	else
		asm volatile("1: vmcall\n"
			     "	jmp 3f\n"
			     "2: mov %[faulted], %%rax\n"
			     "3:\n" _ASM_EXTABLE(1b, 2b)
			     : "+a"(status), "+c"(control), "+d"(input), "+r"(flag)
			     : [faulted] "i"(HB_FAULTED)
			     : "r9", "r10", "r11", "cc", "memory");
	return status;
}

static bool notrace hb_ring(struct hb_queue *queue)
{
	if (likely(!hb_signal(READ_ONCE(queue->id)))) {
		atomic64_inc(&queue->hypercall);
		this_cpu_inc(hb_totals.hypercall);
		return true;
	}
	atomic64_inc(&queue->refused);
	this_cpu_inc(hb_totals.refused);
	if (atomic_cmpxchg(&queue->state, HB_ARMED, HB_REFUSED) == HB_ARMED)
		irq_work_queue(&hb_refused_work);
	return false;
}

/*
 * hb_kick - ring the queue by hypercall, if that is its doorbell now
 *
 * False: the caller must go on to the plain doorbell at once.
 */
bool notrace hb_kick(struct virtqueue *vq)
{
	struct hb_queue *queue;
	bool rung = false;

	preempt_disable_notrace();
	queue = hb_queue_find(vq);
	if (queue && atomic_read_acquire(&queue->state) == HB_ARMED)
		rung = hb_ring(queue);
	if (!rung) {
		if (queue)
			atomic64_inc(&queue->plain);
		this_cpu_inc(hb_totals.plain);
	}
	preempt_enable_notrace();
	return rung;
}

struct hb_totals hb_totals_sum(void)
{
	struct hb_totals sum = {};
	int cpu;

	for_each_possible_cpu(cpu) {
		const struct hb_totals *totals = per_cpu_ptr(&hb_totals, cpu);

		sum.hypercall += READ_ONCE(totals->hypercall);
		sum.plain += READ_ONCE(totals->plain);
		sum.refused += READ_ONCE(totals->refused);
	}
	return sum;
}

/*
 * hb_kick_quiesce - wait for the last refusal to have been handed on, once no kick comes any more
 */
void hb_kick_quiesce(void)
{
	irq_work_sync(&hb_refused_work);
}
