/*
 * Device windows: the registers of virtio-mmio (virtio 1.3, 4.2.2) that a vCPU's thread serves itself, because a
 * driver touches them for every interrupt or notification.
 */
#include "vmm.h"

#include <fcntl.h>
#include <unistd.h>

#define QUEUE_NOTIFY 0x050
#define INTERRUPT_STATUS 0x060
#define INTERRUPT_ACK 0x064

struct window *window_at(struct vm *vm, uint64_t gpa, uint32_t length)
{
	for (uint32_t i = 0; i < vm->window_count; i++) {
		struct window *w = &vm->windows[i];

		if (gpa >= w->gpa && gpa - w->gpa < w->size && length <= w->size - (gpa - w->gpa))
			return w;
	}
	return NULL;
}

struct window *window_of_port(struct vm *vm, uint32_t port)
{
	for (uint32_t i = 0; port && i < vm->window_count; i++)
		if (vm->windows[i].notify_port == port)
			return &vm->windows[i];
	return NULL;
}

static bool taken(struct vm *vm, uint64_t gpa, uint64_t size, uint32_t notify_port)
{
	for (uint32_t i = 0; i < vm->window_count; i++) {
		struct window *w = &vm->windows[i];

		if (gpa < w->gpa + w->size && w->gpa < gpa + size)
			return true;
		if (notify_port && w->notify_port == notify_port)
			return true;
	}
	return gpa < vm->ram_size;
}

struct window *vm_add_window(struct vm *vm, uint64_t gpa, uint64_t size, void *interrupt_status, uint32_t notify_port,
			     int *error)
{
	struct window *w = &vm->windows[vm->window_count];

	*error = 0;
	if (vm->threads)
		*error = VMM_E_RUNNING;
	else if (vm->window_count == VMM_WINDOWS_MAX)
		*error = VMM_E_WINDOWS;
	else if (size == 0 || size > UINT32_MAX || gpa > UINT64_MAX - size)
		*error = -EINVAL;
	else if (taken(vm, gpa, size, notify_port))
		*error = VMM_E_OVERLAP;
	if (*error)
		return NULL;
	memset(w, 0, sizeof(*w));
	w->gpa = gpa;
	w->size = size;
	w->interrupt_status = interrupt_status;
	w->notify_port = notify_port;
	w->index = vm->window_count;
	pthread_mutex_init(&w->lock, NULL);
	for (uint32_t i = 0; i < VMM_QUEUES_MAX; i++)
		w->kicks[i] = -1;
	vm->window_count++;
	return w;
}

int window_set_kick(struct window *w, uint32_t queue, int fd)
{
	int kick = -1, old;

	if (queue >= VMM_QUEUES_MAX)
		return -EINVAL;
	if (fd >= 0) {
		kick = fcntl(fd, F_DUPFD_CLOEXEC, 0);
		if (kick < 0)
			return -errno;
	}
	pthread_mutex_lock(&w->lock);
	old = w->kicks[queue];
	w->kicks[queue] = kick;
	pthread_mutex_unlock(&w->lock);
	if (old >= 0)
		close(old);
	return 0;
}

uint64_t window_strays(struct window *w)
{
	return load_relaxed(&w->strays);
}

bool window_notify(struct window *w, uint32_t queue)
{
	bool rung = false;

	if (queue < VMM_QUEUES_MAX) {
		pthread_mutex_lock(&w->lock);
		if (w->kicks[queue] >= 0) {
			wake(w->kicks[queue]);
			rung = true;
		}
		pthread_mutex_unlock(&w->lock);
	}
	if (!rung)
		__atomic_fetch_add(&w->strays, 1, __ATOMIC_RELAXED);
	return rung;
}

bool window_serve(struct window *w, uint32_t offset, bool is_write, uint32_t *value)
{
	if (offset == QUEUE_NOTIFY && is_write) {
		window_notify(w, *value);
		return true;
	}
	if (!w->interrupt_status)
		return false;
	if (offset == INTERRUPT_STATUS && !is_write) {
		/* Pairs with the release of whoever set a bit after it wrote what the bit announces. */
		*value = load_acquire(w->interrupt_status);
		return true;
	}
	if (offset == INTERRUPT_ACK && is_write) {
		__atomic_fetch_and(w->interrupt_status, ~*value, __ATOMIC_ACQ_REL);
		return true;
	}
	return false;
}

void window_release(struct window *w)
{
	for (uint32_t i = 0; i < VMM_QUEUES_MAX; i++)
		if (w->kicks[i] >= 0)
			close(w->kicks[i]);
	pthread_mutex_destroy(&w->lock);
}
