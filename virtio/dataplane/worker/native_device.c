/* The life of a native device: as long as a queue, a request, a source or Python refers to it. */
#include "worker/worker.h"

struct native_device *native_device_ref(struct native_device *device)
{
	__atomic_add_fetch(&device->refs, 1, __ATOMIC_RELAXED);
	return device;
}

void native_device_unref(struct native_device *device)
{
	if (device && __atomic_sub_fetch(&device->refs, 1, __ATOMIC_ACQ_REL) == 0)
		device->ops->free(device);
}
