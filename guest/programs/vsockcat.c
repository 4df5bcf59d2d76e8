/*
 * vsockcat [-m SIZE] connect CID PORT | listen PORT: standard input to an AF_VSOCK stream, the stream to standard output.
 *
 * The end of the input ends our half of the stream; the program ends when both halves have. "listen" serves one
 * connection. "ready" on standard error says that it listens. With -m it is messages of SIZE bytes (the last one may be
 * shorter), and standard error tells the length of each that comes: "message LENGTH".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#define CHUNK_SIZE (256 * 1024)

static size_t message_size; /* 0: a stream */

static int fail(const char *what)
{
	fprintf(stderr, "vsockcat: %s: %s\n", what, strerror(errno));
	return 1;
}

static int socket_open(int argc, char **argv)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
	int fd = socket(AF_VSOCK, (message_size ? SOCK_SEQPACKET : SOCK_STREAM) | SOCK_CLOEXEC, 0);
	int stream;

	if (fd < 0)
		return -1;
	if (argc == 4 && !strcmp(argv[1], "connect")) {
		address.svm_cid = (unsigned int)strtoul(argv[2], NULL, 10);
		address.svm_port = (unsigned int)strtoul(argv[3], NULL, 10);
		return connect(fd, (struct sockaddr *)&address, sizeof(address)) ? -1 : fd;
	}
	address.svm_port = (unsigned int)strtoul(argv[2], NULL, 10);
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 1))
		return -1;
	fprintf(stderr, "ready\n");
	stream = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
	close(fd);
	return stream;
}

/* Copy until the end; -1: an error. */
static int copy_all(int from, int to)
{
	static char chunk[CHUNK_SIZE];
	ssize_t length, done, n;

	while ((length = read(from, chunk, sizeof(chunk))) > 0) {
		for (done = 0; done < length; done += n) {
			n = write(to, chunk + done, (size_t)(length - done));
			if (n < 0)
				return -1;
		}
	}
	return (int)length;
}

static int send_messages(int from, int to)
{
	static char message[CHUNK_SIZE];
	ssize_t length;

	do {
		size_t filled = 0;

		do {
			length = read(from, message + filled, message_size - filled);
			filled += length > 0 ? (size_t)length : 0;
		} while (length > 0 && filled < message_size);
		if (filled && send(to, message, filled, 0) != (ssize_t)filled)
			return -1;
	} while (length > 0);
	return (int)length;
}

static int receive_messages(int from, int to)
{
	static char message[CHUNK_SIZE];
	ssize_t length;

	while ((length = recv(from, message, sizeof(message), 0)) > 0) {
		fprintf(stderr, "message %zd\n", length);
		if (write(to, message, (size_t)length) != length)
			return -1;
	}
	return (int)length;
}

/* Each direction has a process of its own: two that send at once must not wait for each other to read. */
int main(int argc, char **argv)
{
	bool connects, listens;
	int stream, status;
	pid_t child;

	if (argc > 2 && !strcmp(argv[1], "-m")) {
		message_size = strtoul(argv[2], NULL, 10);
		argc -= 2;
		argv += 2;
	}
	connects = argc == 4 && !strcmp(argv[1], "connect");
	listens = argc == 3 && !strcmp(argv[1], "listen");
	if (message_size > CHUNK_SIZE || (!connects && !listens)) {
		fprintf(stderr, "usage: vsockcat [-m SIZE] connect CID PORT | listen PORT\n");
		return 2;
	}
	stream = socket_open(argc, argv);
	if (stream < 0)
		return fail(argv[1]);
	child = fork();
	if (child < 0)
		return fail("fork");
	if (child == 0) {
		if ((message_size ? send_messages : copy_all)(STDIN_FILENO, stream))
			return fail("sending");
		return shutdown(stream, SHUT_WR) ? fail("shutdown") : 0;
	}
	if ((message_size ? receive_messages : copy_all)(stream, STDOUT_FILENO))
		return fail("receiving");
	if (waitpid(child, &status, 0) < 0)
		return fail("waiting");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
