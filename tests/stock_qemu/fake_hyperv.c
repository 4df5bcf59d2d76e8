/*
 * KVM_HYPERV_EVENTFD for a KVM that lacks it: preloaded beneath the library under test, it answers for that one
 * capability and keeps the ids in a table; every other call goes to the real KVM. The tests ask it by its functions.
 * With FAKE_ERROR in the environment it has the capability only in name, and answers every call with that errno.
 */
#include <dlfcn.h>
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define IDS_MAX 256

static struct {
	int vm;
	uint32_t number;
	int fd;	/* a duplicate: KVM holds the eventfd, not its number */
} ids[IDS_MAX];
static unsigned int id_count, call_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int find(int vm, uint32_t number)
{
	for (unsigned int i = 0; i < id_count; i++)
		if (ids[i].vm == vm && ids[i].number == number)
			return (int)i;
	return -1;
}

static int change(int vm, const struct kvm_hyperv_eventfd *request)
{
	int place = find(vm, request->conn_id);
	const char *error = getenv("FAKE_ERROR");

	call_count++;
	if (error)
		return atoi(error);
	if (request->flags & KVM_HYPERV_EVENTFD_DEASSIGN) {
		if (place < 0)
			return ENOENT;
		close(ids[place].fd);
		ids[place] = ids[--id_count];
		return 0;
	}
	if (request->conn_id & ~KVM_HYPERV_CONN_ID_MASK)
		return EINVAL;
	if (place >= 0)
		return EEXIST;
	if (id_count == IDS_MAX)
		return ENOSPC;
	ids[id_count].vm = vm;
	ids[id_count].number = request->conn_id;
	ids[id_count].fd = dup(request->fd);
	if (ids[id_count].fd < 0)
		return EBADF;
	id_count++;
	return 0;
}

int ioctl(int fd, unsigned long request, ...)
{
	static int (*next)(int, unsigned long, ...);
	va_list arguments;
	void *argument;
	int error;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (!next)
		next = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
	if (request == KVM_CHECK_EXTENSION && (uintptr_t)argument == KVM_CAP_HYPERV_EVENTFD)
		return 1;
	if (request != KVM_HYPERV_EVENTFD)
		return next(fd, request, argument);
	pthread_mutex_lock(&lock);
	error = change(fd, argument);
	pthread_mutex_unlock(&lock);
	errno = error;
	return error ? -1 : 0;
}

/* The ids of all VMs, at most `room`; how many there are. */
int fake_ids(uint32_t *numbers, int room)
{
	int count;

	pthread_mutex_lock(&lock);
	count = (int)id_count;
	for (int i = 0; i < count && i < room; i++)
		numbers[i] = ids[i].number;
	pthread_mutex_unlock(&lock);
	return count;
}

/* What a guest's hypercall with that id does; the status it would see. */
int fake_ring(int vm, uint32_t number)
{
	uint64_t one = 1;
	int place, status = 3;

	pthread_mutex_lock(&lock);
	place = find(vm, number);
	if (place >= 0 && write(ids[place].fd, &one, sizeof(one)) == sizeof(one))
		status = 0;
	pthread_mutex_unlock(&lock);
	return status;
}

/* How often KVM_HYPERV_EVENTFD was called. */
unsigned int fake_calls(void)
{
	unsigned int count;

	pthread_mutex_lock(&lock);
	count = call_count;
	pthread_mutex_unlock(&lock);
	return count;
}
