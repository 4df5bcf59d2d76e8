/* The table of drivers: a new one is a file beside this, and a line in the table. */
#include "drivers/drivers.h"

#include <stddef.h>

const struct driver *driver_find(uint32_t id)
{
	static const struct driver *const drivers[] = { &blk_driver, &rng_driver, &net_driver };
	uint32_t i;

	for (i = 0; i < sizeof(drivers) / sizeof(drivers[0]); i++) {
		if (drivers[i]->id == id)
			return drivers[i];
	}
	return NULL;
}
