/*
 * A memory file may shrink under us: whoever shares it can truncate it, and the next touch is a SIGBUS.
 *
 * The handler looks the address up in a lock-free table of our mappings, lays anonymous zeroes over the *whole*
 * mapping (one 4 KiB page does not fit over huge pages) and marks it dead; the queues that use it break when they
 * next look. The faulting thread holds a reference of the mapping, so its slot cannot change meanwhile. A fault
 * anywhere else, or a machine check, goes to the handler that was there before.
 */
#include "memory/memory.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define GUARD_SLOTS 16384 /* 32 devices with 509 memory slots each */

static struct guard {
	uintptr_t start; /* atomic; 0: free. Written last on guard, first on unguard */
	uintptr_t end;   /* atomic */
	struct mapping *mapping;
} guards[GUARD_SLOTS];

static uint32_t guards_used; /* atomic: slots ever used, so that the handler need not walk them all */
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous;
uint32_t sigbus_deaths;

static struct mapping *guard_find(uintptr_t address)
{
	uint32_t used = load_acquire(&guards_used);

	for (uint32_t i = 0; i < used; i++) {
		uintptr_t start = load_acquire(&guards[i].start);

		if (start && address >= start && address < load_acquire(&guards[i].end) &&
		    load_acquire(&guards[i].start) == start)
			return load_acquire(&guards[i].mapping);
	}
	return NULL;
}

static void pass_on(int number, siginfo_t *info, void *context)
{
	static pid_t passing; /* atomic: the thread that is in here */
	pid_t self = (pid_t)syscall(SYS_gettid);

	/*
	 * A handler may be before us and after us (faulthandler, switched off and on again): then it hands the fault back
	 * to us, and the default has to end it. Returning runs the faulting instruction again.
	 */
	if (load_relaxed(&passing) == self ||
	    (!(previous.sa_flags & SA_SIGINFO) && (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN))) {
		signal(SIGBUS, SIG_DFL);
		return;
	}
	store_relaxed(&passing, self);
	if (previous.sa_flags & SA_SIGINFO)
		previous.sa_sigaction(number, info, context);
	else
		previous.sa_handler(number);
	store_relaxed(&passing, 0);
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	int saved = errno;
	struct mapping *m = NULL;

	if (info->si_code == BUS_ADRERR)
		m = guard_find((uintptr_t)info->si_addr);
	if (m && mmap(m->map_base, m->map_size, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED) {
		store_release(&m->dead, 1);
		__atomic_add_fetch(&sigbus_deaths, 1, __ATOMIC_RELEASE);
		errno = saved;
		return;
	}
	pass_on(number, info, context);
	errno = saved;
}

int sigbus_install(void)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };
	struct sigaction current;

	if (sigaction(SIGBUS, NULL, &current) < 0)
		return -errno;
	if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_sigbus)
		return 0;
	previous = current;
	return sigaction(SIGBUS, &action, NULL) < 0 ? -errno : 0;
}

int sigbus_guard(struct mapping *m)
{
	int slot = -ENOSPC;

	pthread_mutex_lock(&guard_lock);
	for (uint32_t i = 0; i < GUARD_SLOTS; i++) {
		if (load_relaxed(&guards[i].start))
			continue;
		store_release(&guards[i].mapping, m);
		store_release(&guards[i].end, (uintptr_t)m->map_base + m->map_size);
		store_release(&guards[i].start, (uintptr_t)m->map_base);
		if (i >= guards_used)
			store_release(&guards_used, i + 1);
		slot = (int)i;
		break;
	}
	pthread_mutex_unlock(&guard_lock);
	return slot;
}

void sigbus_unguard(struct mapping *m)
{
	pthread_mutex_lock(&guard_lock);
	store_release(&guards[m->slot].start, 0);
	pthread_mutex_unlock(&guard_lock);
}
