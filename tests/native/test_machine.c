/* A real VM under the sanitizers, where /dev/kvm is: registers, output, notifications, ends, and stops at any moment. */
#include "vmm.h"
#include "check.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define RAM_SIZE (1u << 20)
#define CODE_GPA 0x1000
#define DEVICE_GPA 0xd0000000u
#define VCPUS 2 /* the second waits for an INIT that never comes */

struct machine {
	struct vm *vm;
	struct window *window;
	uint32_t interrupt_status;
	int ram_fd, event_fd, kick_fd;
	uint64_t printed, accesses;
};

static void machine_open(struct machine *m, int kvm_fd)
{
	struct vm_failure failure;
	int error;

	memset(m, 0, sizeof(*m));
	m->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	m->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	m->ram_fd = memfd_create("ram", MFD_CLOEXEC);
	CHECK(ftruncate(m->ram_fd, RAM_SIZE) == 0);
	m->vm = vm_new(kvm_fd, m->ram_fd, RAM_SIZE, VCPUS, m->event_fd, &failure);
	CHECK(m->vm);
	m->window = vm_add_window(m->vm, DEVICE_GPA, 0x200, &m->interrupt_status, 0x1000, &error);
	CHECK(m->window && window_set_kick(m->window, 1, m->kick_fd) == 0);
}

static void machine_close(struct machine *m)
{
	vm_free(m->vm);
	close(m->ram_fd);
	close(m->event_fd);
	close(m->kick_fd);
}

static void machine_start(struct machine *m, const uint8_t *code, size_t size, uint32_t rcx)
{
	struct entry_state entry = { .mode = VM_ENTER_PVH, .rip = CODE_GPA, .rcx = rcx };

	CHECK(pwrite(m->ram_fd, code, size, CODE_GPA) == (ssize_t)size);
	CHECK(vm_enter_at(m->vm, &entry) == 0);
	CHECK(vm_start(m->vm) == 0);
}

static void machine_wait(struct machine *m)
{
	struct pollfd p = { .fd = m->event_fd, .events = POLLIN };
	uint64_t count;

	CHECK(poll(&p, 1, 20000) == 1);
	CHECK(read(m->event_fd, &count, sizeof(count)) == sizeof(count));
}

static void machine_stop(struct machine *m)
{
	vm_stop(m->vm);
	while (vm_running(m->vm))
		machine_wait(m);
	vm_join(m->vm);
}

static struct vm_end machine_attend(struct machine *m)
{
	uint8_t bytes[256];
	struct access access;
	struct vm_end end;

	for (;;) {
		machine_wait(m);
		m->printed += vm_take_output(m->vm, bytes, sizeof(bytes));
		while (vm_take_access(m->vm, &access)) {
			m->accesses++;
			vm_answer(m->vm, access.vcpu, access.offset + 5);
		}
		vm_read_end(m->vm, &end);
		if (end.kind != VM_END_NONE)
			break;
	}
	machine_stop(m);
	m->printed += vm_take_output(m->vm, bytes, sizeof(bytes));
	return end;
}

static void a_driver_goes_through_its_registers(int kvm_fd, uint32_t rounds)
{
	static const uint8_t code[] = {
		0xa1, 0x00, 0x00, 0x00, 0xd0,			/* 1: mov 0xd0000000, %eax */
		0xe6, 0xe9,					/* out %al, $0xe9 */
		0xa3, 0x04, 0x00, 0x00, 0xd0,			/* mov %eax, 0xd0000004 */
		0xb8, 0x01, 0x00, 0x00, 0x00,			/* mov $1, %eax */
		0xa3, 0x50, 0x00, 0x00, 0xd0,			/* mov %eax, 0xd0000050: notify queue 1 */
		0xa1, 0x60, 0x00, 0x00, 0xd0,			/* mov 0xd0000060, %eax: InterruptStatus */
		0xa3, 0x64, 0x00, 0x00, 0xd0,			/* mov %eax, 0xd0000064: InterruptACK */
		0x49,						/* dec %ecx */
		0x75, 0xdd,					/* jnz 1b */
		0xb0, 0x07, 0xe6, 0xf4,				/* mov $7, %al; out %al, $0xf4 */
	};
	struct vm_stats stats;
	struct machine m;
	struct vm_end end;
	uint64_t kicks = 0;

	machine_open(&m, kvm_fd);
	m.interrupt_status = 3;
	machine_start(&m, code, sizeof(code), rounds);
	end = machine_attend(&m);
	CHECK(end.kind == VM_END_EXIT && end.status == 7);
	CHECK(m.printed == rounds && m.accesses == 2 * rounds && m.interrupt_status == 0);
	CHECK(read(m.kick_fd, &kicks, sizeof(kicks)) == sizeof(kicks) && kicks == rounds);
	vm_read_stats(m.vm, &stats);
	CHECK(stats.handed_over == 2 * rounds && stats.served == 3 * rounds && stats.stray_notifies == 0);
	machine_close(&m);
}

static void a_stop_finds_it_anywhere(int kvm_fd, uint32_t times)
{
	static const uint8_t spin[] = { 0xeb, 0xfe };
	static const uint8_t halt[] = { 0xf4, 0xeb, 0xfd };
	static const uint8_t ask[] = { 0xa1, 0x00, 0x00, 0x00, 0xd0, 0xeb, 0xf9 };
	struct machine m;

	machine_open(&m, kvm_fd);
	for (uint32_t i = 0; i < times; i++) {
		struct access access;

		switch (i % 4) {
		case 0:
			machine_start(&m, spin, sizeof(spin), 0);
			break;
		case 1:
			machine_start(&m, halt, sizeof(halt), 0);
			break;
		case 2:
			machine_start(&m, ask, sizeof(ask), 0); /* and is perhaps asking just now */
			break;
		default:
			machine_start(&m, ask, sizeof(ask), 0);
			do
				machine_wait(&m);
			while (!vm_take_access(m.vm, &access));
		}
		machine_stop(&m);
	}
	machine_close(&m);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 200;
	int kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (kvm_fd < 0) {
		printf("no /dev/kvm: %s\n", strerror(errno));
		return EXIT_SKIPPED;
	}
	alarm(100);
	a_driver_goes_through_its_registers(kvm_fd, rounds);
	a_stop_finds_it_anywhere(kvm_fd, rounds);
	close(kvm_fd);
	printf("ok\n");
	return 0;
}
