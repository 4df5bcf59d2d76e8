/*
 * What the preload library in a QEMU process and the daemon say to each other.
 *
 * A SOCK_SEQPACKET Unix socket, one connection a VM, the library connects. Every message is one struct wire_message,
 * little-endian, whole or not at all; whoever gets anything else ends that connection. transports/qemu_doorbells has
 * the other side's table; a test holds the two together.
 */
#ifndef HYPERBELL_PRELOAD_WIRE_H
#define HYPERBELL_PRELOAD_WIRE_H

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the messages are little-endian, and so are the machines this is for"
#endif

#define WIRE_MAGIC 0x42624848u	/* "HHbB" */
#define WIRE_VERSION 1
#define WIRE_NAME_SIZE 32	/* with the terminating zero */

/* From the library. VM comes first, and again when something in it has changed. */
#define WIRE_VM 1		/* name, flags, result: why there are no ids (WIRE_REASON_...) */
#define WIRE_BELL 2		/* bell, serial, flags; with one descriptor: the eventfd itself */
#define WIRE_BELL_GONE 3	/* bell, serial */
#define WIRE_VCPU 4		/* vcpu; with one descriptor: KVM's statistics of it */
#define WIRE_ANSWER 5		/* bell, serial, flags: whether it is registered now; result: 0 or an errno */

/* From the daemon. */
#define WIRE_WELCOME 32		/* the answer to the first VM */
#define WIRE_REGISTER 33	/* bell, serial */
#define WIRE_WITHDRAW 34	/* bell, serial */

/* Flags of VM. */
#define WIRE_VM_KEY_SHOWN 1u	/* the guest sees the platform leaf */
#define WIRE_VM_KEY_STABLE 2u	/* K was given, not drawn */
#define WIRE_VM_INCOMING 4u	/* its guest comes from a migration or a snapshot, or may */
#define WIRE_VM_CPUID_SEEN 8u	/* the two below mean something */
#define WIRE_VM_HYPERV 16u	/* the guest has Hyper-V leaves */
#define WIRE_VM_MAY_NEST 32u	/* the guest is shown VMX or SVM */

/* Flags of BELL and ANSWER. */
#define WIRE_BELL_REGISTERED 1u

/* Why a VM has no ids. */
#define WIRE_REASON_NONE 0
#define WIRE_REASON_NO_CAPABILITY 1	/* KVM here cannot do it (KVM_CAP_HYPERV_EVENTFD) */
#define WIRE_REASON_NO_HYPERV 2		/* the guest has no Hyper-V leaves: hv-relaxed is missing */
#define WIRE_REASON_INCOMING 3		/* no stable key, and the guest may remember another one */
#define WIRE_REASON_CPUID_REFUSED 4	/* KVM did not take the platform leaf (E2BIG: no room) */
#define WIRE_REASON_NO_KEY 5		/* the key given is none, or none could be drawn */

struct wire_message {
	uint32_t magic;
	uint16_t version;
	uint16_t type;
	uint32_t bell;
	uint32_t serial;	/* of this assignment of the bell; a later one has another */
	uint32_t flags;
	int32_t result;
	uint32_t vcpu;
	uint32_t reserved;	/* 0 */
	char name[WIRE_NAME_SIZE];
};

_Static_assert(sizeof(struct wire_message) == 64, "the size on the wire");

#endif
