/* What tells a peer, and can never hold its thread for good. */
#ifndef HYPERBELL_NOTIFY_H
#define HYPERBELL_NOTIFY_H

#include "dataplane.h"

enum { NOTIFY_EVENTFD, NOTIFY_PIPE, NOTIFY_SOCKET };

/* Which of these `fd` is, or DP_E_NOT_NOTIFIER, or -errno. */
int notify_kind(int fd);
/*
 * Add 1, or send it as 8 bytes. 0: the peer knows, also where it has not read yet and nothing more fits in.
 * -EINTR: it keeps a blocking eventfd full. Any other -errno: there is nobody at the other end.
 */
int notify(int fd, uint32_t kind);
/* Would a signal wait for the peer? */
bool notify_would_wait(int fd);
/* A thread that signalled and is about to end gives its timer back. */
void eventfd_signal_thread_end(void);

#endif
