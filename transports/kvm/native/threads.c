/* How threads of ours begin, and how one wakes another, or Python. Any file of this folder may use both. */
#include "vmm.h"

#include <signal.h>
#include <unistd.h>

int thread_start(pthread_t *thread, void *(*main)(void *), void *argument, const char *name)
{
	sigset_t all, old;
	int rc;

	sigfillset(&all);
	sigdelset(&all, SIGBUS); /* a fault, which cannot wait */
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rc = pthread_create(thread, NULL, main, argument);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc == 0)
		pthread_setname_np(*thread, name);
	return -rc;
}

void wake(int event_fd)
{
	uint64_t one = 1;

	if (write(event_fd, &one, sizeof(one)) < 0)
		return; /* a non-blocking eventfd, full: whoever reads it has not read it yet */
}
