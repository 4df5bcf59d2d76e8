/* One virtio-blk request (virtio 1.3, 5.2.6): choosing it, building its chain, judging what came back. */

#include "frontend.h"

static uint64_t next_random(uint64_t *state) /* xorshift64* */
{
	uint64_t x = *state;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	*state = x;
	return x * 0x2545F4914F6CDD1Dull;
}

static uint32_t histogram_bucket(uint64_t ns)
{
	const uint32_t parts = 1 << FE_HISTOGRAM_SHIFT; /* of each power of two */
	uint32_t top, bucket;

	if (ns < parts)
		return ns;
	top = 63 - __builtin_clzll(ns);
	bucket = (top - FE_HISTOGRAM_SHIFT + 1) * parts + ((ns >> (top - FE_HISTOGRAM_SHIFT)) & (parts - 1));
	return bucket < FE_HISTOGRAM_BUCKETS ? bucket : FE_HISTOGRAM_BUCKETS - 1;
}

static uint64_t choose_block(struct fe_queue *q, const struct fe_job *job)
{
	uint64_t block;

	if (job->order == FE_RANDOM)
		block = (uint64_t)((unsigned __int128)next_random(&q->random) * q->blocks >> 64);
	else
		block = q->next_block;
	/* A write beside another request to the same block would leave its content open. */
	while (q->busy && q->busy[block])
		block = block + 1 < q->blocks ? block + 1 : 0;
	q->next_block = block + 1 < q->blocks ? block + 1 : 0;
	return block;
}

void request_submit(struct fe_queue *q, const struct fe_job *job, uint64_t now_ns)
{
	struct segment segments[FE_SEGMENTS_MAX + 2];
	uint32_t id = q->free_ids[--q->free_count];
	struct request *request = &q->requests[id];
	struct control *control = queue_control(q, id);
	uint64_t block = choose_block(q, job);
	uint64_t data_gpa, data_at = q->data_at + id * q->data_stride;
	uint32_t left = job->request_bytes, count = 0;
	uint16_t data_flags;

	request->block = q->first_block + block;
	request->is_write = job->write_percent && next_random(&q->random) % 100 < job->write_percent;
	request->in_flight = 1;
	request->submitted_ns = now_ns;
	if (q->busy)
		q->busy[block] = 1;
	if (request->is_write)
		job->generations[request->block]++;
	if (job->generations)
		request->generation = job->generations[request->block];
	if (request->is_write)
		fe_fill(q->setup.memory + data_at, request->block * job->request_bytes, job->request_bytes,
			job->pattern_seed, request->generation);
	control->header.type = request->is_write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
	control->header.reserved = 0;
	control->header.sector = request->block * (job->request_bytes / SECTOR_SIZE);
	control->status = 0xff;

	segments[count++] = (struct segment){ queue_control_gpa(q, id), sizeof(control->header), 0 };
	data_flags = request->is_write ? 0 : VRING_DESC_F_WRITE;
	for (data_gpa = q->setup.gpa + data_at; left; count++) {
		uint32_t length = left < q->setup.segment ? left : q->setup.segment;

		segments[count] = (struct segment){ data_gpa, length, data_flags };
		data_gpa += length;
		left -= length;
	}
	segments[count++] = (struct segment){ queue_control_gpa(q, id) + offsetof(struct control, status), 1,
					      VRING_DESC_F_WRITE };
	q->submitted++;
	q->in_flight++;
	q->ops->add(q, id, segments, count);
}

int request_finish(struct fe_queue *q, struct run *r, uint32_t id, uint32_t len)
{
	const struct fe_job *job = r->job;
	struct fe_result *result = q->result;
	struct request *request = &q->requests[id];
	const uint8_t *data = q->setup.memory + q->data_at + id * q->data_stride;
	uint64_t latency = r->now - request->submitted_ns;
	uint64_t offset = request->block * job->request_bytes;
	uint8_t status = queue_control(q, id)->status;
	int64_t wrong;

	if (!request->in_flight)
		return run_fail(r, q, FE_E_BAD_ID, id);
	request->in_flight = 0;
	q->in_flight--;
	q->free_ids[q->free_count++] = id;
	if (q->busy)
		q->busy[request->block - q->first_block] = 0;
	if (job->verify && !status && !request->is_write) {
		wrong = fe_check(data, offset, job->request_bytes, job->pattern_seed, request->generation);
		if (wrong >= 0)
			return run_fail(r, q, FE_E_BAD_DATA, offset + (uint64_t)wrong);
	}
	if (r->now > r->deadline)
		return 0;
	result->requests++;
	result->writes += request->is_write;
	result->errors += status != 0;
	result->odd_lengths += !status && len != (request->is_write ? 0 : job->request_bytes) + 1;
	result->elapsed_ns = r->now - r->start;
	result->latency_sum_ns += latency;
	if (latency > result->latency_max_ns)
		result->latency_max_ns = latency;
	result->histogram[histogram_bucket(latency)]++;
	return 0;
}
