/*
 * The preload library: it stands between QEMU and ioctl(), and gives a VM the hypercall doorbell.
 *
 * DOORBELLS.md, "The preload library for stock QEMU", has the rules it keeps. Threads: QEMU's own call the functions
 * of vm.c, vcpu.c and bells.c through ioctl.c; one thread of ours a VM runs link.c. Calls go one way: ioctl.c -> vm.c
 * and vcpu.c -> link.c -> bells.c -> state.c and real.c; cpuid.c and environment.c call nothing of ours. All state is behind one mutex, which nobody
 * holds while waiting for anything but the kernel: no thread of QEMU ever waits for the daemon.
 */
#ifndef HYPERBELL_PRELOAD_H
#define HYPERBELL_PRELOAD_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "wire.h"

#define BELLS_MAX 4096		/* of one VM; more keep their plain doorbells */
#define VCPUS_MAX 4096
#define VMS_MAX 8		/* of one process; QEMU has one */

#define KEY_MASK 0xffffffu	/* keys, bells and connection ids have 24 bits */
#define BELL_RESERVED 0xffffffu	/* never registered: what a driver calls to see a status that is not 0 */
#define PORT_MIN 0x100u		/* below it there is no virtio device */

/* One notify port with one queue index, as QEMU registered it. */
struct bell {
	uint32_t number;
	uint32_t serial;
	int fd;			/* ours, a duplicate of QEMU's eventfd; -1: QEMU has taken it away */
	bool used;		/* this slot holds something */
	bool reported;		/* the daemon knows this bell, by some serial */
	bool changed;		/* and has not heard the latest of it */
	bool registered;	/* its id is in KVM */
	bool answering;		/* the daemon waits for an ANSWER */
	uint32_t asked;		/* the serial it asked for */
	int result;		/* errno of what it asked for */
};

struct vcpu {
	int fd;			/* QEMU's */
	int stats_fd;		/* ours; -1: KVM has none */
	uint32_t number;
	bool reported;
	bool key_shown;		/* it was given the leaf, and KVM takes nothing else from now on */
};

/* Everything but fd, key and wake_fd is behind the lock. */
struct vm {
	int fd;			/* QEMU's: only a thread of its process can use it, and a duplicate would keep the VM */
	uint32_t key;		/* K */
	int wake_fd;		/* ours: rung when there is something to report */
	bool ended;
	bool changed;		/* the daemon has not heard flags and reason */
	uint32_t flags;		/* WIRE_VM_... */
	int reason;		/* WIRE_REASON_... */
	uint32_t serial;	/* of the latest bell */
	unsigned int bell_count;	/* slots that were ever used */
	unsigned int vcpu_count;
	struct vcpu *vcpus;
	struct bell bells[BELLS_MAX];
};

/* What `hyperbell qemu` said by the environment. */
struct settings {
	bool active;
	bool has_key;
	bool key_is_wrong;
	uint32_t key;
	char socket[108];
	char name[WIRE_NAME_SIZE];
};

/* real.c, and the tests' own in its place */
int kvm_ioctl(int fd, unsigned long request, void *argument);

/* environment.c */
const struct settings *settings_take(void);
bool vm_is_incoming(void);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* cpuid.c */
bool cpuid_has_hyperv(const struct kvm_cpuid2 *cpuid);
bool cpuid_may_nest(const struct kvm_cpuid2 *cpuid);
struct kvm_cpuid2 *cpuid_with_key(const struct kvm_cpuid2 *cpuid, uint32_t key);

/* state.c */
extern pthread_mutex_t state_lock;
extern struct vm *vms[VMS_MAX];
struct vm *vm_by_fd(int fd);
void vm_wake(struct vm *vm);
void vm_forget_reports(struct vm *vm);
void vm_free(struct vm *vm);
void close_if_open(int *fd);

/* bells.c */
bool vm_withhold(struct vm *vm, int reason);
void say_why(int reason);
void ioeventfd_changed(int vm_fd, const struct kvm_ioeventfd *change);
void vm_obey(struct vm *vm, const struct wire_message *message);

/* link.c */
bool link_start(struct vm *vm, const struct settings *settings);

/* vm.c */
void vm_created(int fd);

/* vcpu.c */
void vcpu_created(int vm_fd, int fd, uint32_t number);
int vcpu_set_cpuid(int fd, struct kvm_cpuid2 *cpuid);
void vcpu_msrs_set(int fd, const struct kvm_msrs *msrs);

#endif
