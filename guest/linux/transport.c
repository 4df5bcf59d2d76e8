// SPDX-License-Identifier: GPL-2.0
/*
 * The table of virtio transports: what their drivers and functions are called, which are hooked, and their devices.
 * Hooking is hook.c's, and what is done with a device the caller's.
 */
#include <linux/device.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/platform_device.h>
#include <linux/sysfs.h>

#include "compat.h"
#include "hyperbell.h"

DEFINE_MUTEX(hb_transports_lock);

struct hb_transport hb_transports[HB_TRANSPORTS] = {
	{
		.module = "virtio_pci",
		.driver = "virtio-pci",
		.bus = &pci_bus_type,
		.notify = "vp_notify",
		.status = "vp_set_status",
	},
	{
		.module = "virtio_mmio",
		.driver = "virtio-mmio",
		.bus = &platform_bus_type,
		.notify = "vm_notify",
		.status = "vm_set_status",
	},
};

/* The transport's driver, which cannot go away until hb_transport_driver_put(); NULL if it is not there. */
struct device_driver *hb_transport_driver_get(const struct hb_transport *transport)
{
	struct device_driver *driver = hb_driver_find(transport->driver, transport->bus);

	return driver && try_module_get(driver->owner) ? driver : NULL;
}

void hb_transport_driver_put(struct device_driver *driver)
{
	module_put(driver->owner);
}

/*
 * hb_transports_walk - call 'each' for each device of the hooked transports; it may sleep
 *
 * Ends at the first that answers other than 0, and gives that back.
 */
int hb_transports_walk(int (*each)(struct device *parent, void *data), void *data)
{
	unsigned int i;
	int ended = 0;

	mutex_lock(&hb_transports_lock);
	for (i = 0; i < HB_TRANSPORTS && !ended; i++) {
		struct device_driver *driver;

		driver = hb_transports[i].hooked ? hb_transport_driver_get(&hb_transports[i]) : NULL;
		if (!driver)
			continue;
		ended = driver_for_each_device(driver, NULL, data, each);
		hb_transport_driver_put(driver);
	}
	mutex_unlock(&hb_transports_lock);
	return ended;
}

/*
 * hb_transports_describe - the hooked functions, for sysfs
 */
ssize_t hb_transports_describe(char *page)
{
	ssize_t length = 0;
	unsigned int i;

	mutex_lock(&hb_transports_lock);
	for (i = 0; i < HB_TRANSPORTS; i++)
		if (hb_transports[i].hooked)
			length += sysfs_emit_at(page, length, "%s %s\n", hb_transports[i].notify,
						hb_transports[i].status);
	mutex_unlock(&hb_transports_lock);
	return length;
}
