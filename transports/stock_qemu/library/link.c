/*
 * The way to the daemon: a thread of our own, which connects, reports what has changed, and does what it is asked.
 *
 * What is to be reported is not queued but marked on the VM's bells and vCPUs, so there is nothing that could
 * overflow, and whatever a new daemon has to hear is what is true now.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "preload.h"

#define STACK_SIZE (128 * 1024)
#define DELAY_MIN_MS 50		/* before the second attempt to connect, doubled after each ... */
#define DELAY_MAX_MS 5000	/* ... up to this */
#define MESSAGES_A_TURN 64	/* read before it is our turn to write again */

struct link {
	struct vm *vm;
	struct sockaddr_un address;
	char name[WIRE_NAME_SIZE];
	int socket;		/* -1: not connected */
	bool blocked;		/* the daemon does not read fast enough */
	int delay_ms;
	int64_t retry_ms;	/* when to try again */
};

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void link_close(struct link *link)
{
	close(link->socket);
	link->socket = -1;
	link->retry_ms = now_ms() + link->delay_ms;
	link->delay_ms = link->delay_ms * 2 < DELAY_MAX_MS ? link->delay_ms * 2 : DELAY_MAX_MS;
}

static void link_connect(struct link *link)
{
	link->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (link->socket < 0 || connect(link->socket, (struct sockaddr *)&link->address, sizeof(link->address)) < 0) {
		link_close(link);
		return;
	}
	link->blocked = false;
	pthread_mutex_lock(&state_lock);
	vm_forget_reports(link->vm);
	pthread_mutex_unlock(&state_lock);
}

/* Whether the daemon has it (or will). Otherwise `blocked` says whether to try again, or the connection is over. */
static bool link_send(struct link *link, struct wire_message *message, int fd)
{
	union {
		char room[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { .room = { 0 } };
	struct iovec part = { .iov_base = message, .iov_len = sizeof(*message) };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };
	ssize_t sent;

	message->magic = WIRE_MAGIC;
	message->version = WIRE_VERSION;
	if (fd >= 0) {
		struct cmsghdr *passed;

		header.msg_control = control.room;
		header.msg_controllen = sizeof(control.room);
		passed = CMSG_FIRSTHDR(&header);
		passed->cmsg_level = SOL_SOCKET;
		passed->cmsg_type = SCM_RIGHTS;
		passed->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(passed), &fd, sizeof(fd));
	}
	do {
		sent = sendmsg(link->socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
	} while (sent < 0 && errno == EINTR);
	if (sent == sizeof(*message))
		return true;
	if (sent < 0 && errno == EAGAIN)
		link->blocked = true;
	else
		link_close(link);
	return false;
}

static bool report_vm(struct link *link)
{
	struct vm *vm = link->vm;
	struct wire_message message = { .type = WIRE_VM, .flags = vm->flags, .result = vm->reason };

	if (!vm->changed)
		return true;
	memcpy(message.name, link->name, sizeof(message.name));
	vm->changed = !link_send(link, &message, -1);
	return !vm->changed;
}

static bool report_vcpus(struct link *link)
{
	for (unsigned int i = 0; i < link->vm->vcpu_count; i++) {
		struct vcpu *vcpu = &link->vm->vcpus[i];
		struct wire_message message = { .type = WIRE_VCPU, .vcpu = vcpu->number };

		if (vcpu->reported || vcpu->stats_fd < 0)
			continue;
		if (!link_send(link, &message, vcpu->stats_fd))
			return false;
		vcpu->reported = true;
	}
	return true;
}

static bool report_bell(struct link *link, struct bell *bell)
{
	struct wire_message message = {
		.type = bell->fd >= 0 ? WIRE_BELL : WIRE_BELL_GONE, .bell = bell->number, .serial = bell->serial,
		.flags = bell->registered ? WIRE_BELL_REGISTERED : 0,
	};

	if (bell->changed) {
		if (!link_send(link, &message, bell->fd))
			return false;
		bell->changed = false;
		bell->reported = bell->used = bell->fd >= 0;
	}
	if (bell->used && bell->answering) {
		message.type = WIRE_ANSWER;
		message.serial = bell->asked;
		message.result = bell->result;
		if (!link_send(link, &message, -1))
			return false;
		bell->answering = false;
	}
	return true;
}

/* Everything that is marked, until the daemon's socket is full. VM is the first message of every connection. */
static void link_report(struct link *link)
{
	struct vm *vm = link->vm;

	pthread_mutex_lock(&state_lock);
	if (report_vm(link) && report_vcpus(link))
		for (unsigned int i = 0; i < vm->bell_count; i++)
			if (vm->bells[i].used && !report_bell(link, &vm->bells[i]))
				break;
	pthread_mutex_unlock(&state_lock);
}

static bool is_well_formed(const struct wire_message *message)
{
	return message->magic == WIRE_MAGIC && message->version == WIRE_VERSION &&
	       (message->type == WIRE_WELCOME || message->type == WIRE_REGISTER || message->type == WIRE_WITHDRAW);
}

/* recv() takes no descriptors: the kernel drops those that a hostile daemon would send. */
static void link_receive(struct link *link)
{
	struct wire_message message;

	for (int i = 0; i < MESSAGES_A_TURN; i++) {
		ssize_t received = recv(link->socket, &message, sizeof(message), MSG_DONTWAIT | MSG_TRUNC);

		if (received < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (received != sizeof(message) || !is_well_formed(&message)) {
			link_close(link);
			return;
		}
		if (message.type == WIRE_WELCOME) {
			link->delay_ms = DELAY_MIN_MS;
			continue;
		}
		pthread_mutex_lock(&state_lock);
		vm_obey(link->vm, &message);
		pthread_mutex_unlock(&state_lock);
	}
}

/* Wait for something to do; the time until the next attempt when there is no daemon. */
static void link_wait(struct link *link)
{
	int64_t rest = link->retry_ms - now_ms();
	uint64_t count;
	struct pollfd events[] = {
		{ .fd = link->vm->wake_fd, .events = POLLIN },
		{ .fd = link->socket, .events = (short)(POLLIN | (link->blocked ? POLLOUT : 0)) },
	};
	int found = poll(events, 2, link->socket >= 0 ? -1 : rest > 0 ? (int)rest : 0);

	if (found <= 0)
		return;
	if (events[0].revents) {
		ssize_t size = read(link->vm->wake_fd, &count, sizeof(count));

		(void)size;	/* EAGAIN: nothing was rung */
	}
	if (events[1].revents & POLLOUT)
		link->blocked = false;
	if (events[1].revents & ~POLLOUT)
		link_receive(link);
}

static bool vm_has_ended(const struct vm *vm)
{
	bool ended;

	pthread_mutex_lock(&state_lock);
	ended = vm->ended;
	pthread_mutex_unlock(&state_lock);
	return ended;
}

static void *link_run(void *argument)
{
	struct link *link = argument;

	while (!vm_has_ended(link->vm)) {
		if (link->socket < 0 && now_ms() >= link->retry_ms)
			link_connect(link);
		if (link->socket >= 0 && !link->blocked)
			link_report(link);
		link_wait(link);
	}
	if (link->socket >= 0)
		close(link->socket);
	vm_free(link->vm);
	free(link);
	return NULL;
}

/* Start the thread. It takes no signal: they are all QEMU's. */
bool link_start(struct vm *vm, const struct settings *settings)
{
	struct link *link = calloc(1, sizeof(*link));
	sigset_t all, before;
	pthread_attr_t attributes;
	pthread_t thread;
	int error;

	if (!link)
		return false;
	link->vm = vm;
	link->socket = -1;
	link->delay_ms = DELAY_MIN_MS;
	link->address.sun_family = AF_UNIX;
	memcpy(link->address.sun_path, settings->socket, sizeof(link->address.sun_path));
	memcpy(link->name, settings->name, sizeof(link->name));
	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_SIZE);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&thread, &attributes, link_run, link);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	if (error)
		free(link);
	else
		pthread_setname_np(thread, "hyperbell");
	return !error;
}
