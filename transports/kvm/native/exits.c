/*
 * What a guest's exit asks for: registers of devices, the few ports there are, and the ends of a VM. Anything that
 * nobody owns reads as all ones, and writes to it go nowhere, as on a bus without a device.
 */
#include "vmm.h"

#include <linux/kvm.h>
#include <sys/ioctl.h>

#define PORT_DEBUG 0xe9
#define PORT_EXIT 0xf4
#define PORT_SERIAL 0x3f8 /* eight registers, of which only sending does anything */
#define PORT_SLEEP_CONTROL 0x600 /* ACPI 6.5, 4.8.3.7: hardware-reduced sleep registers */
#define PORT_SLEEP_STATUS 0x601
#define PORT_RESET 0x602

#define SERIAL_DATA 0
#define SERIAL_LCR 3
#define SERIAL_LSR 5
#define LCR_DIVISOR_LATCH 0x80
#define LSR_SENT 0x60 /* the transmitter is empty */

#define SLEEP_ENABLE 0x20
#define SLEEP_TYPE(value) ((value) >> 2 & 7)
#define SLEEP_TYPE_S5 5
#define RESET_VALUE 1

#define HV_STATUS_INVALID_CONNECTION_ID 0x12

static void print(struct vcpu *v, const uint8_t *bytes, uint32_t count)
{
	if (output_put(&v->vm->output, bytes, count))
		wake(v->vm->event_fd);
}

static bool finish(struct vcpu *v, uint32_t kind, uint32_t status)
{
	struct vm_end end = { .kind = kind, .status = status };

	vm_end_with(v, &end);
	return false;
}

static void unknown_pio(struct vcpu *v)
{
	stat_add(&v->stats.unknown_pio, 1);
}

/* ---- ports ---- */

static void serial_write(struct vcpu *v, uint32_t reg, uint8_t value)
{
	if (reg == SERIAL_LCR)
		store_relaxed(&v->vm->serial_lcr, value);
	else if (reg == SERIAL_DATA && !(load_relaxed(&v->vm->serial_lcr) & LCR_DIVISOR_LATCH))
		print(v, &value, 1); /* behind the latch it is the divisor of the speed */
}

static uint8_t serial_read(struct vcpu *v, uint32_t reg)
{
	switch (reg) {
	case SERIAL_LCR:
		return load_relaxed(&v->vm->serial_lcr);
	case SERIAL_LSR:
		return LSR_SENT;
	case SERIAL_DATA:
		return 0; /* nothing was received */
	default:
		return 0xff;
	}
}

static bool port_write(struct vcpu *v, uint32_t port, const uint8_t *data, uint32_t size)
{
	struct window *w = window_of_port(v->vm, port);
	uint32_t value = 0;

	memcpy(&value, data, size);
	if (w && size >= 2) {
		window_notify(w, value); /* KVM had no ioeventfd for this queue */
		return true;
	}
	if (port - PORT_SERIAL < 8) {
		serial_write(v, port - PORT_SERIAL, (uint8_t)value);
		return true;
	}
	switch (port) {
	case PORT_DEBUG:
		print(v, data, size);
		return true;
	case PORT_EXIT:
		return finish(v, VM_END_EXIT, value & 0xff);
	case PORT_SLEEP_CONTROL:
		if ((value & SLEEP_ENABLE) && SLEEP_TYPE(value) == SLEEP_TYPE_S5)
			return finish(v, VM_END_POWER_OFF, 0);
		return true;
	case PORT_SLEEP_STATUS:
		return true;
	case PORT_RESET:
		if (value == RESET_VALUE)
			return finish(v, VM_END_RESET, 0);
		return true;
	default:
		unknown_pio(v);
		return true;
	}
}

static void port_read(struct vcpu *v, uint32_t port, uint8_t *data, uint32_t size)
{
	memset(data, 0xff, size);
	if (port - PORT_SERIAL < 8)
		data[0] = serial_read(v, port - PORT_SERIAL);
	else if (port == PORT_SLEEP_CONTROL || port == PORT_SLEEP_STATUS)
		data[0] = 0;
	else
		unknown_pio(v);
}

static bool serve_ports(struct vcpu *v)
{
	struct kvm_run *run = v->run;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	bool goes_on = true;

	stat_add(&v->stats.pio, 1);
	for (uint32_t i = 0; i < run->io.count && goes_on; i++, data += run->io.size) {
		if (run->io.direction == KVM_EXIT_IO_OUT)
			goes_on = port_write(v, run->io.port, data, run->io.size);
		else
			port_read(v, run->io.port, data, run->io.size);
	}
	return goes_on;
}

/* ---- device windows ---- */

static bool hand_over(struct vcpu *v, struct window *w, uint32_t offset, uint64_t *data)
{
	struct kvm_run *run = v->run;

	v->handover.access = (struct access){
		.vcpu = v->index,
		.window = w->index,
		.offset = offset,
		.length = run->mmio.len,
		.is_write = run->mmio.is_write,
		.data = *data,
	};
	stat_add(&v->stats.handed_over, 1);
	if (!handover_ask(&v->handover, v->vm->event_fd))
		return false;
	*data = v->handover.access.data;
	return true;
}

static bool serve_mmio(struct vcpu *v)
{
	struct kvm_run *run = v->run;
	struct window *w = window_at(v->vm, run->mmio.phys_addr, run->mmio.len);
	bool is_write = run->mmio.is_write, goes_on = true;
	uint64_t data = 0;
	uint32_t word;

	if (!w) {
		stat_add(&v->stats.unknown_mmio, 1);
		if (!is_write)
			memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
		return true;
	}
	if (is_write)
		memcpy(&data, run->mmio.data, run->mmio.len);
	word = (uint32_t)data;
	if (run->mmio.len == sizeof(word) && window_serve(w, (uint32_t)(run->mmio.phys_addr - w->gpa), is_write, &word)) {
		stat_add(&v->stats.served, 1);
		data = word;
	} else {
		goes_on = hand_over(v, w, (uint32_t)(run->mmio.phys_addr - w->gpa), &data);
	}
	if (!is_write)
		memcpy(run->mmio.data, &data, sizeof(data));
	return goes_on;
}

/* ---- ends ---- */

static void failure_begin(struct vcpu *v, struct vm_end *end)
{
	struct kvm_regs regs;

	*end = (struct vm_end){ .kind = VM_END_FAILED, .exit_reason = v->run->exit_reason };
	if (ioctl(v->fd, KVM_GET_REGS, &regs) == 0)
		end->rip = regs.rip;
}

void exit_failed(struct vcpu *v, int error)
{
	struct vm_end end;

	failure_begin(v, &end);
	end.error = -error;
	vm_end_with(v, &end);
}

static bool unusable(struct vcpu *v)
{
	struct kvm_run *run = v->run;
	struct vm_end end;

	failure_begin(v, &end);
	switch (run->exit_reason) {
	case KVM_EXIT_FAIL_ENTRY:
		end.data[0] = run->fail_entry.hardware_entry_failure_reason;
		end.data[1] = run->fail_entry.cpu;
		end.words = 2;
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		end.data[0] = run->internal.suberror;
		end.words = 1;
		while (end.words < ARRAY_SIZE(end.data) && end.words <= run->internal.ndata) {
			end.data[end.words] = run->internal.data[end.words - 1];
			end.words++;
		}
		break;
	default:
		end.data[0] = run->hw.hardware_exit_reason;
		end.words = 1;
	}
	vm_end_with(v, &end);
	return false;
}

static bool serve_system_event(struct vcpu *v)
{
	switch (v->run->system_event.type) {
	case KVM_SYSTEM_EVENT_SHUTDOWN:
		return finish(v, VM_END_POWER_OFF, 0);
	case KVM_SYSTEM_EVENT_RESET:
		return finish(v, VM_END_RESET, 0);
	default:
		return unusable(v);
	}
}

bool exit_serve(struct vcpu *v)
{
	struct kvm_run *run = v->run;

	switch (run->exit_reason) {
	case KVM_EXIT_MMIO:
		return serve_mmio(v);
	case KVM_EXIT_IO:
		return serve_ports(v);
	case KVM_EXIT_INTR:
		return true;
	case KVM_EXIT_SHUTDOWN:
		return finish(v, VM_END_RESET, VM_RESET_TRIPLE_FAULT);
	case KVM_EXIT_SYSTEM_EVENT:
		return serve_system_event(v);
	case KVM_EXIT_HYPERV:
		if (run->hyperv.type == KVM_EXIT_HYPERV_HCALL) {
			/* Only with SynIC, which nobody gets from us, does an unknown id come this far. */
			run->hyperv.u.hcall.result = HV_STATUS_INVALID_CONNECTION_ID;
			stat_add(&v->stats.refused_hypercalls, 1);
		}
		return true;
	default:
		return unusable(v);
	}
}
