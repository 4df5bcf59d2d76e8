/* The Python pump's way to a queue: ring/chain.c. Driver thread only. */

struct chain;
struct chain_info {
	uint64_t readable_len;
	uint64_t writable_len;
	uint32_t head;
};

/* Read every doorbell's eventfd, never blocking; returns the sum of their counts. */
uint64_t virtqueue_take_kicks(struct virtqueue *vq);
/*
 * Up to `max` chains into `chains`, or so many as hold a MiB; returns how many, VQ_BROKEN, or 0 (empty or parked).
 * One of more than `request_max` bytes, readable or writable, breaks the queue.
 */
int virtqueue_pop_many(struct virtqueue *vq, struct chain **chains, uint32_t max, uint32_t request_max,
		       uint32_t as_they_come);
void chain_info(const struct chain *c, struct chain_info *info);
int64_t chain_read(const struct chain *c, uint64_t offset, void *buffer, uint64_t length);
int64_t chain_write(struct chain *c, uint64_t offset, const void *buffer, uint64_t length);
void chain_time(struct chain *c, uint32_t op, uint32_t failed);
/* Return `count` chains with the bytes written to each; frees them; publishes and notifies once. */
void virtqueue_push_many(struct virtqueue *vq, struct chain **chains, const uint32_t *written, uint32_t count);
/* Un-pop the `count` chains popped last, oldest first in `chains`: the next pop finds them again. Frees them. */
void virtqueue_rewind(struct virtqueue *vq, struct chain **chains, uint32_t count);
/* Free a chain without returning it to the driver (the queue is being reset). */
void chain_drop(struct chain *c);
/* 1: broken, so no kick is of interest before it is set up again. */
int virtqueue_broken(struct virtqueue *vq);
/* 1: kicks are on and the ring was empty after that; 0: there is work. */
int virtqueue_arm(struct virtqueue *vq);
void virtqueue_disarm(struct virtqueue *vq);
/* Signal the call fd once, whatever the driver asked for. */
void virtqueue_signal(struct virtqueue *vq);
void virtqueue_break(struct virtqueue *vq, uint32_t fault, uint32_t head, uint64_t address, uint64_t length);
