/*
 * What the guest prints, from any vCPU to Python. A guest that prints faster than Python reads loses bytes, which are
 * counted; it never waits.
 */
#include "vmm.h"

void output_init(struct output *o)
{
	pthread_mutex_init(&o->lock, NULL);
}

bool output_put(struct output *o, const uint8_t *bytes, uint32_t count)
{
	bool tell;

	pthread_mutex_lock(&o->lock);
	for (uint32_t i = 0; i < count; i++) {
		if (o->head - o->tail == OUTPUT_BYTES) {
			o->dropped += count - i;
			break;
		}
		o->bytes[o->head++ % OUTPUT_BYTES] = bytes[i];
	}
	tell = !o->told;
	o->told = true;
	pthread_mutex_unlock(&o->lock);
	return tell;
}

uint32_t output_take(struct output *o, uint8_t *buffer, uint32_t capacity)
{
	uint32_t count = 0;

	pthread_mutex_lock(&o->lock);
	while (count < capacity && o->tail != o->head)
		buffer[count++] = o->bytes[o->tail++ % OUTPUT_BYTES];
	if (o->tail == o->head)
		o->told = false;
	pthread_mutex_unlock(&o->lock);
	return count;
}

uint64_t output_dropped(struct output *o)
{
	uint64_t dropped;

	pthread_mutex_lock(&o->lock);
	dropped = o->dropped;
	pthread_mutex_unlock(&o->lock);
	return dropped;
}

uint32_t vm_take_output(struct vm *vm, uint8_t *buffer, uint32_t capacity)
{
	return output_take(&vm->output, buffer, capacity);
}
