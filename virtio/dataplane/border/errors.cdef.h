/*
 * The border between Python and C, a file a subject: read by cffi and included by dataplane.h, so the two cannot drift.
 * Only plain structs, prototypes and numeric #defines may stand here (cffi takes nothing else).
 *
 * Return codes: >= 0 is success; -1 .. -4095 is a negated errno; DP_E_* (below -4095) are our own.
 * Threads: "driver thread" is the one thread that drives a virtqueue: a worker, or the trio thread.
 */

#define DP_E_SHORT_FILE -5001
#define DP_E_NOT_EVENTFD -5002
#define DP_E_NOT_NOTIFIER -5005
#define DP_E_KEPT_FULL -5006 /* a blocking eventfd that its owner keeps full */
#define DP_E_RING_ALIGN -5003
#define DP_E_RING_SIZE -5004
#define DP_E_BASE -5007

#define DP_HISTOGRAM_BUCKETS 25
#define DP_QUEUE_OPS 8
