/* Walking over pieces of memory (an iovec array): every byte is passed once. Driver thread. */
#ifndef HYPERBELL_PIECES_H
#define HYPERBELL_PIECES_H

#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

struct pieces {
	const struct iovec *iov;
	uint32_t count;
	uint64_t at; /* passed of the first piece */
};

static inline struct pieces pieces_of(const struct iovec *iov, uint32_t count)
{
	return (struct pieces){ .iov = iov, .count = count };
}

/* The contiguous bytes that come next; their number, 0 at the end. */
static inline uint64_t pieces_next(struct pieces *p, uint8_t **next)
{
	while (p->count && p->at == p->iov->iov_len) {
		p->iov++;
		p->count--;
		p->at = 0;
	}
	if (!p->count)
		return 0;
	*next = (uint8_t *)p->iov->iov_base + p->at;
	return p->iov->iov_len - p->at;
}

static inline uint64_t pieces_skip(struct pieces *p, uint64_t length)
{
	uint64_t done = 0, n;
	uint8_t *next;

	while (done < length && (n = pieces_next(p, &next))) {
		if (n > length - done)
			n = length - done;
		p->at += n;
		done += n;
	}
	return done;
}

/* Copy out of the pieces; the bytes copied, fewer than `length` only where the pieces end. */
static inline uint64_t pieces_read(struct pieces *from, void *buffer, uint64_t length)
{
	uint64_t done = 0, n;
	uint8_t *next;

	while (done < length && (n = pieces_next(from, &next))) {
		if (n > length - done)
			n = length - done;
		memcpy((uint8_t *)buffer + done, next, n);
		from->at += n;
		done += n;
	}
	return done;
}

/* Copy into the pieces. */
static inline uint64_t pieces_write(struct pieces *to, const void *buffer, uint64_t length)
{
	uint64_t done = 0, n;
	uint8_t *next;

	while (done < length && (n = pieces_next(to, &next))) {
		if (n > length - done)
			n = length - done;
		memcpy(next, (const uint8_t *)buffer + done, n);
		to->at += n;
		done += n;
	}
	return done;
}

/*
 * Copy from pieces to pieces, say from one guest's memory into another's. They may overlap: a driver whose frames come
 * back to it may post one buffer for both ways, which is its own affair.
 */
static inline uint64_t pieces_move(struct pieces *to, struct pieces *from, uint64_t length)
{
	uint64_t done = 0, n, room;
	uint8_t *source, *target;

	while (done < length && (n = pieces_next(from, &source)) && (room = pieces_next(to, &target))) {
		if (n > room)
			n = room;
		if (n > length - done)
			n = length - done;
		memmove(target, source, n);
		from->at += n;
		to->at += n;
		done += n;
	}
	return done;
}

/* What is left of the pieces as an iovec array of its own; how many, at most `max`. */
static inline uint32_t pieces_rest(struct pieces *p, struct iovec *iov, uint32_t max)
{
	uint32_t count = 0;
	uint64_t n;
	uint8_t *next;

	while (count < max && (n = pieces_next(p, &next))) {
		iov[count++] = (struct iovec){ next, n };
		p->at += n;
	}
	return count;
}

#endif
