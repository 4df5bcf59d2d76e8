/* The drivers that this program has. */
#ifndef TOY_DRIVERS_H
#define TOY_DRIVERS_H

#include "transport/device.h"

extern const struct driver blk_driver, rng_driver, net_driver;

/* NULL: none for this virtio device id. */
const struct driver *driver_find(uint32_t id);

#endif
