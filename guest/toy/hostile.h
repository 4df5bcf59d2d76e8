/* What a driver must not do, done on purpose: the device has to live through it. */
#ifndef TOY_HOSTILE_H
#define TOY_HOSTILE_H

#include "transport/device.h"

/* Write nonsense to every register of every size, and read them all. The device is reset afterwards. */
int hostile_nonsense(struct device *device);

/* Ring queues that do not exist, by every plain doorbell that there is. */
int hostile_flood(struct device *device);

/* Rings outside memory, misaligned, of impossible sizes: the device must say NEEDS_RESET or not get ready. */
int hostile_outside(struct device *device);

#endif
