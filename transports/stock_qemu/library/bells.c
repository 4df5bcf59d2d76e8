/* The doorbells of a VM: QEMU's registrations of them, their ids in KVM, and why a VM has no ids. */
#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "preload.h"

static int hyperv_eventfd(const struct vm *vm, const struct bell *bell, uint32_t flags)
{
	struct kvm_hyperv_eventfd change = {
		.conn_id = bell->number ^ vm->key,
		.fd = flags & KVM_HYPERV_EVENTFD_DEASSIGN ? -1 : bell->fd,
		.flags = flags,
	};

	return kvm_ioctl(vm->fd, KVM_HYPERV_EVENTFD, &change) < 0 ? errno : 0;
}

/* ENOENT: the id is not there, which is what was wanted. */
static int withdraw(const struct vm *vm, struct bell *bell)
{
	int error = bell->registered ? hyperv_eventfd(vm, bell, KVM_HYPERV_EVENTFD_DEASSIGN) : 0;

	if (error && error != ENOENT)
		return error;
	bell->registered = false;
	return 0;
}

/* From now on this VM has no ids, for `reason`, the first one given. Whether that is news. */
bool vm_withhold(struct vm *vm, int reason)
{
	if (vm->reason)
		return false;
	vm->reason = reason;
	vm->flags &= ~WIRE_VM_KEY_SHOWN;
	vm->changed = true;
	for (unsigned int i = 0; i < vm->bell_count; i++)
		if (vm->bells[i].used && vm->bells[i].registered) {
			withdraw(vm, &vm->bells[i]);
			vm->bells[i].changed = true;
		}
	vm_wake(vm);
	return true;
}

void say_why(int reason)
{
	static const char *const texts[] = {
		[WIRE_REASON_NO_CAPABILITY] = "KVM on this host has no KVM_HYPERV_EVENTFD",
		[WIRE_REASON_NO_HYPERV] = "the guest has no Hyper-V leaves; add hv-relaxed to -cpu",
		[WIRE_REASON_INCOMING] = "a VM that comes from elsewhere (-incoming, -loadvm, loadvm) needs the key it had there: "
					 "--key, or --secret and --uuid",
		[WIRE_REASON_CPUID_REFUSED] = "KVM did not take the platform leaf (its table of CPUID leaves is full)",
		[WIRE_REASON_NO_KEY] = "the key is not 1 to 6 hexadecimal digits other than 0",
	};

	say("no hypercall doorbell for this VM, its plain doorbells serve: %s", texts[reason]);
}

static struct bell *bell_by_number(struct vm *vm, uint32_t number)
{
	for (unsigned int i = 0; i < vm->bell_count; i++)
		if (vm->bells[i].used && vm->bells[i].number == number)
			return &vm->bells[i];
	return NULL;
}

static struct bell *bell_slot(struct vm *vm)
{
	for (unsigned int i = 0; i < vm->bell_count; i++)
		if (!vm->bells[i].used)
			return &vm->bells[i];
	return vm->bell_count < BELLS_MAX ? &vm->bells[vm->bell_count++] : NULL;
}

/* QEMU has taken the plain doorbell away: the id goes with it, before QEMU goes on. */
static void bell_gone(const struct vm *vm, struct bell *bell)
{
	withdraw(vm, bell);
	close_if_open(&bell->fd);
	bell->changed = true;
	bell->used = bell->reported;	/* until the daemon was told */
}

/* A duplicate of our own; -1: the last quarter of the descriptors that the process may have is QEMU's alone. */
static int fd_duplicate(int fd)
{
	struct rlimit limit;
	int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);

	if (own < 0 || getrlimit(RLIMIT_NOFILE, &limit) < 0 || (rlim_t)own < limit.rlim_cur - limit.rlim_cur / 4)
		return own;
	close(own);
	return -1;
}

static bool bell_appeared(struct vm *vm, uint32_t number, int fd)
{
	struct bell *bell = bell_by_number(vm, number);
	int own = fd_duplicate(fd);
	bool reported = bell && bell->reported;

	if (bell && bell->fd >= 0)
		bell_gone(vm, bell);	/* KVM has no two of one number, so this one must have gone */
	if (!bell)
		bell = bell_slot(vm);
	if (own < 0 || !bell) {
		if (own >= 0)
			close(own);
		if (bell && !reported)
			*bell = (struct bell){ .fd = -1 };
		return false;
	}
	*bell = (struct bell){
		.number = number, .serial = ++vm->serial, .fd = own, .used = true, .reported = reported, .changed = true,
	};
	return true;
}

/* After KVM_IOEVENTFD. A doorbell of ours is a port, two bytes wide, with the queue's index as the value to match. */
void ioeventfd_changed(int vm_fd, const struct kvm_ioeventfd *change)
{
	const uint32_t wanted = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH;
	static bool said;
	struct bell *bell;
	struct vm *vm;
	bool fits = true;
	uint32_t number;

	if ((change->flags & wanted) != wanted || change->len != 2 || change->addr < PORT_MIN ||
	    change->addr > 0xffff || change->datamatch > 0xff)
		return;
	number = (uint32_t)(change->addr << 8 | change->datamatch);
	if (number == BELL_RESERVED)
		return;
	pthread_mutex_lock(&state_lock);
	vm = vm_by_fd(vm_fd);
	if (vm && change->flags & KVM_IOEVENTFD_FLAG_DEASSIGN) {
		bell = bell_by_number(vm, number);
		if (bell && bell->fd >= 0)
			bell_gone(vm, bell);
	} else if (vm) {
		fits = bell_appeared(vm, number, change->fd) || said;
		said |= !fits;
	}
	if (vm)
		vm_wake(vm);
	pthread_mutex_unlock(&state_lock);
	if (!fits)
		say("more than %d doorbells, or too few descriptors (ulimit -n): the others stay plain", BELLS_MAX);
}

/*
 * Do what the daemon asks for, on our own thread; a bell that has gone or come anew since is not meant. Nor is a VM whose
 * number is another VM's by now: the thread of the first may be in the midst of what it was sent.
 */
void vm_obey(struct vm *vm, const struct wire_message *message)
{
	struct bell *bell = bell_by_number(vm, message->bell);

	if (vm->ended || !bell || bell->fd < 0 || bell->serial != message->serial)
		return;
	if (message->type == WIRE_WITHDRAW) {
		bell->result = withdraw(vm, bell);
	} else if (vm->reason || !(vm->flags & WIRE_VM_KEY_SHOWN)) {
		bell->result = EPERM;
	} else if ((bell->number ^ vm->key) == BELL_RESERVED) {
		bell->result = EADDRNOTAVAIL;	/* the id that must answer with a status other than 0 */
	} else if (!bell->registered) {
		bell->result = hyperv_eventfd(vm, bell, 0);
		bell->registered = !bell->result;
	} else {
		bell->result = 0;
	}
	bell->asked = message->serial;
	bell->answering = true;
}
