/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The hypercall doorbell of virtio queues, guest side: what the module's parts share.
 *
 * A kick goes like this: vp_notify() or vm_notify() is entered, ftrace calls hb_notify_entered() (hook.c), which asks
 * hb_kick() (kick.c). If the queue was rung by hypercall, the driver's function is skipped; if not, it runs as if this
 * module were not there. So the plain doorbell is always the driver's own code.
 *
 * Calls go one way: main.c -> show.c and hook.c -> kick.c -> scan.c -> transport.c, queue.c -> platform.c.
 */
#ifndef HYPERBELL_H
#define HYPERBELL_H

#include <linux/atomic.h>
#include <linux/cache.h>
#include <linux/device.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/types.h>
#include <linux/virtio.h>

#ifndef CONFIG_X86_64
#error "The hypercall doorbell is for 64-bit x86 guests: in 32-bit code the call's registers are others."
#endif
#ifndef CONFIG_DYNAMIC_FTRACE_WITH_REGS
#error "This kernel lacks CONFIG_DYNAMIC_FTRACE_WITH_REGS, by which the module gets at the kicks."
#endif

#define HB_BELL_MAX	0xffffff	/* bell numbers, keys and connection ids have 24 bits */
#define HB_BELL_RESERVED 0xffffff	/* never registered by any hypervisor */
#define HB_QUEUES_SHIFT	10
#define HB_QUEUES	(1U << HB_QUEUES_SHIFT)

/* What a queue does with its next kick. */
enum hb_state {
	HB_PLAIN,	/* the plain doorbell: it has no other, or may not use it */
	HB_ARMED,	/* the hypercall */
	HB_REFUSED,	/* the plain doorbell: a hypercall has just been refused, the worker will see to it */
	HB_WAITING,	/* the plain doorbell until it is armed again; it may have no bell meanwhile */
};

/*
 * One queue. Entries live in a fixed table, are made and changed by the worker under hb_queues_lock, and read without
 * a lock by kicks, with preemption disabled: a forgotten entry is used again only after an RCU grace period.
 */
struct hb_queue {
	struct virtqueue *vq;		/* the key; NULL: free, or forgotten */
	struct virtio_device *vdev;	/* with the next two: is it still the same queue? */
	void *priv;
	unsigned int index;
	u32 id;				/* connection id: the bell number xor the platform's key */
	atomic_t state;			/* enum hb_state */
	atomic64_t hypercall;		/* kicks rung by hypercall */
	atomic64_t plain;		/* kicks left to the plain doorbell, refused ones included */
	atomic64_t refused;		/* hypercalls that did not answer 0 */

	/* The worker's. */
	bool used;
	u32 bell;
	unsigned long seen;		/* the last scan that met this queue */
	unsigned int delay_ms;		/* how long the last refusal made it wait */
	unsigned long due;		/* jiffies: when to arm it again, or to see whether it has a bell again */
	s64 rung;			/* what 'hypercall' was when it was last armed, or made to wait */
	char device[16];
} ____cacheline_aligned;

struct hb_totals {
	u64 hypercall;
	u64 plain;
	u64 refused;
};

DECLARE_PER_CPU(struct hb_totals, hb_totals);

/* platform.c: may this guest ring by hypercall at all? */
bool hb_platform_look(void);
bool hb_platform_available(void);
ssize_t hb_platform_describe(char *page);
u32 hb_platform_key(void);
void hb_platform_withdraw(void);

/* kick.c: the fast path. */
bool hb_kick(struct virtqueue *vq);
struct hb_totals hb_totals_sum(void);
void hb_kick_quiesce(void);

/* queue.c: the table. */
extern struct mutex hb_queues_lock;
extern struct hb_queue hb_queues[HB_QUEUES];
struct hb_queue *hb_queue_find(const struct virtqueue *vq);
struct hb_queue *hb_queue_claim(struct virtqueue *vq);
void hb_queue_settle(struct hb_queue *queue, u32 bell);
void hb_queues_hurry(void);
void hb_queues_disarm(void);
void hb_queues_forget(const struct virtio_device *vdev);
void hb_queues_sweep(unsigned long seen);
void hb_queues_reclaim(void);
unsigned long hb_queues_next(void);

/* transport.c: the table of transports. */
#define HB_TRANSPORTS	2

struct hb_transport {
	const char *module;
	const char *driver;
	const struct bus_type *bus;
	const char *notify;	/* the functions of the driver that are hooked */
	const char *status;
	struct module *owner;	/* NULL: built in */
	bool hooked;
};

extern struct mutex hb_transports_lock;
extern struct hb_transport hb_transports[HB_TRANSPORTS];
struct device_driver *hb_transport_driver_get(const struct hb_transport *transport);
void hb_transport_driver_put(struct device_driver *driver);
int hb_transports_walk(int (*each)(struct device *parent, void *data), void *data);
ssize_t hb_transports_describe(char *page);

/* scan.c: the worker, which does all that is not a kick. */
void hb_scan_soon(void);
void hb_scan_now(bool by_hand);
void hb_scan_stop(void);

/* hook.c: ftrace on the virtio transports' functions. */
int hb_hooks_start(void);
void hb_hooks_stop(void);

/* show.c: sysfs and debugfs. */
int hb_show_start(void);
void hb_show_stop(void);

#endif
