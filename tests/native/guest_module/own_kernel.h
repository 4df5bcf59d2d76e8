/*
 * As much of a kernel as the decisions of guest/linux need: a clock, CPUID and one MSR, virtio devices with or without
 * our registers, and a worker that runs when it is told to. Every kernel header that those files include is this one.
 */
#ifndef OWN_KERNEL_H
#define OWN_KERNEL_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t s64;

#define CONFIG_X86_64 1
#define CONFIG_DYNAMIC_FTRACE_WITH_REGS 1
#define KBUILD_MODNAME "hyperbell"
#define KERNEL_VERSION(version, patch, sub) ((version) << 16 | (patch) << 8 | (sub))
#define BIT(n) (1U << (n))
#define BIT_ULL(n) (1ULL << (n))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define ____cacheline_aligned
#define __iomem
#define notrace
#define fallthrough __attribute__((fallthrough))
#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile __typeof__(x) *)&(x) = (value))
#define smp_load_acquire(p) READ_ONCE(*(p))
#define smp_store_release(p, value) WRITE_ONCE(*(p), value)
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define min_t(type, a, b) min((type)(a), (type)(b))
#define module_param(name, type, mode)
#define MODULE_PARM_DESC(name, text)
#define DECLARE_PER_CPU(type, name) extern type name
#define synchronize_rcu() ((void)0)

#define pr_info(format, ...) kernel_log(format, ##__VA_ARGS__)
#define pr_warn(format, ...) kernel_log(format, ##__VA_ARGS__)
#define sysfs_emit(page, format, ...) snprintf(page, 4096, format, ##__VA_ARGS__)
void kernel_log(const char *format, ...);

static inline void strscpy(char *to, const char *from, size_t size)
{
	snprintf(to, size, "%s", from);
}

typedef struct { int value; } atomic_t;
typedef struct { s64 value; } atomic64_t;
#define atomic_read(a) ((a)->value)
#define atomic_set(a, v) ((a)->value = (v))
#define atomic_set_release atomic_set
#define atomic64_read atomic_read

/* The clock: a jiffy is a millisecond, and passes when the test says so. It begins before it wraps, as Linux's does. */
extern unsigned long jiffies;
#define MAX_JIFFY_OFFSET ((unsigned long)(~0UL >> 1) - 1)
#define msecs_to_jiffies(ms) ((unsigned long)(ms))
#define time_before(a, b) ((long)((a) - (b)) < 0)

struct mutex { bool held; };
#define DEFINE_MUTEX(name) struct mutex name
#define mutex_lock(m) (assert(!(m)->held), (m)->held = true)
#define mutex_unlock(m) (assert((m)->held), (m)->held = false)
#define lockdep_assert_held(m) assert((m)->held)
typedef struct { int unused; } spinlock_t;
#define spin_lock(s) ((void)(s))
#define spin_unlock(s) ((void)(s))

#define DECLARE_BITMAP(name, bits) bool name[bits]
#define bitmap_zero(map, bits) memset(map, 0, bits)
#define __set_bit(bit, map) ((map)[bit] = true)
#define bitmap_empty(map, bits) (!memchr(map, true, bits))
#define for_each_set_bit(bit, map, bits) for ((bit) = 0; (bit) < (bits); (bit)++) if ((map)[bit])
#define container_of(p, type, member) ((type *)((char *)(p) - offsetof(type, member)))
#define hash_ptr(p, bits) (((uintptr_t)(p) >> 4) & ((1U << (bits)) - 1))

/* Devices. A child is a virtio device, its parent what the transport's driver is bound to. */
struct bus_type { int unused; };
struct device_driver;
struct device_driver *driver_find(const char *name, const struct bus_type *bus);
extern struct bus_type platform_bus_type, pci_bus_type;
struct device {
	const char *name;
	struct device *parent;
	struct bus_type *bus;
	void *driver;
	bool locked; /* by somebody else */
};
struct virtio_device;
struct virtio_config_ops { u8 (*get_status)(struct virtio_device *vdev); };
struct virtqueue {
	struct virtqueue *next;
	struct virtio_device *vdev;
	unsigned int index;
	void *priv;
};
struct virtio_device {
	struct device dev;
	const struct virtio_config_ops *config;
	spinlock_t vqs_list_lock;
	struct virtqueue *vqs;
};
#define list_for_each_entry(entry, head, member) for ((entry) = *(head); (entry); (entry) = (entry)->next)
#define is_virtio_device(device) ((device)->bus == NULL)
#define dev_to_virtio(device) ((struct virtio_device *)(device)) /* its first member */
#define dev_name(device) ((device)->name)
#define device_trylock(device) (!(device)->locked)
#define device_unlock(device) ((void)(device))
int device_for_each_child(struct device *parent, void *data, int (*each)(struct device *, void *));

struct resource { unsigned long start; unsigned long size; };
#define IORESOURCE_MEM 0
#define to_platform_device(device) (device)
#define resource_size(resource) ((resource)->size)
struct resource *platform_get_resource(struct device *device, int type, int number);
#define ioremap(start, size) ((void *)(start))
#define iounmap(mmio) ((void)(mmio))
u32 readl(const void *address);
void writel(u32 value, void *address);
#define VIRTIO_MMIO_MAGIC_VALUE 0x000
#define VIRTIO_MMIO_VERSION 0x004
#define VIRTIO_MMIO_QUEUE_SEL 0x030
#define VIRTIO_CONFIG_S_DRIVER_OK 4

/* The worker: one piece of work, and the jiffies until it is due; MAX_JIFFY_OFFSET: nobody wants it. */
struct work_struct { int unused; };
struct delayed_work { void (*function)(struct work_struct *); unsigned long delay; };
#define DECLARE_DELAYED_WORK(name, f) struct delayed_work name = { f, MAX_JIFFY_OFFSET }
#define system_freezable_wq NULL
#define queue_delayed_work(queue, work, d) ((work)->delay == MAX_JIFFY_OFFSET ? (work)->delay = (d) : 0)
#define mod_delayed_work(queue, work, d) ((work)->delay = (d))
#define flush_delayed_work(work) kernel_run(work)
#define cancel_delayed_work_sync(work) ((work)->delay = MAX_JIFFY_OFFSET)
static inline void kernel_run(struct delayed_work *work)
{
	work->delay = MAX_JIFFY_OFFSET;
	work->function(NULL);
}

/* The processor. */
void cpuid(u32 leaf, u32 *eax, u32 *ebx, u32 *ecx, u32 *edx);
static inline u32 cpuid_eax(u32 leaf)
{
	u32 a, b, c, d;

	cpuid(leaf, &a, &b, &c, &d);
	return a;
}
static inline u32 cpuid_ecx(u32 leaf)
{
	u32 a, b, c, d;

	cpuid(leaf, &a, &b, &c, &d);
	return c;
}
unsigned int num_possible_cpus(void);
bool cc_platform_has(int attribute);
bool cpu_feature_enabled(int feature);
/* By their names of before Linux 6.16, or by those of after. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
#define rdmsr_safe_function rdmsrl_safe
#define wrmsr_safe_function wrmsrl_safe
#else
#define rdmsr_safe_function rdmsrq_safe
#define wrmsr_safe_function wrmsrq_safe
#endif
int rdmsr_safe_function(u32 msr, u64 *value);
int wrmsr_safe_function(u32 msr, u64 value);
#define CC_ATTR_GUEST_STATE_ENCRYPT 1
#define X86_FEATURE_TDX_GUEST 2
#define HV_X64_MSR_GUEST_OS_ID 0x40000000
#define HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS 0x40000000
#define HYPERV_CPUID_INTERFACE 0x40000001
#define HYPERV_CPUID_FEATURES 0x40000003
#define HV_MSR_HYPERCALL_AVAILABLE BIT(5)
#define KVM_FEATURE_PV_UNHALT 7
#define KVM_FEATURE_PV_SEND_IPI 11
#define KVM_FEATURE_PV_SCHED_YIELD 13
#define KVM_FEATURE_HC_MAP_GPA_RANGE 16

#endif
