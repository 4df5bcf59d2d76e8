// SPDX-License-Identifier: GPL-2.0
/*
 * The worker: it meets every queue of every running virtio device, learns its bell number, and arms it. It runs when
 * a device has been set up, when a hypercall was refused, when a queue has waited long enough, and by hand. Each time
 * it looks at the platform first.
 */
#include <linux/compiler.h>
#include <linux/device.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/jiffies.h>
#include <linux/minmax.h>
#include <linux/platform_device.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/workqueue.h>

#include <uapi/linux/virtio_mmio.h>

#include "hyperbell.h"

#define HB_BUSY_MS	100	/* a device that is just being probed or removed: look again */

/* What lib/iomap.c makes of an I/O port; vq->priv is such a cookie where the notify address is a port. */
#define HB_PIO_OFFSET	0x10000UL
#define HB_PORT_FIRST	0x100UL	/* no virtio device lives below */
#define HB_PORT_LAST	0xffffUL

/* Our own virtio-mmio device's registers, in the range that the specification reserves. */
#define HB_MMIO_KEY	0x0f0
#define HB_MMIO_BELL	0x0f4
#define HB_MMIO_SIZE	0x100
#define HB_MMIO_MAGIC	('v' | 'i' << 8 | 'r' << 16 | 't' << 24)

struct hb_scan {
	unsigned long seen;
	bool available;
	bool busy;
	void __iomem *mmio;	/* the registers of the device whose queues are being met, if it has the key */
};

static void hb_scan_work(struct work_struct *work);
static DECLARE_DELAYED_WORK(hb_scan_worker, hb_scan_work);

static u32 hb_bell_checked(u32 bell)
{
	return bell < HB_BELL_RESERVED ? bell : 0;
}

/* A port's bell number is what an outw to it would say. One that is memory has none. */
static u32 hb_pci_bell(const struct virtqueue *vq)
{
	unsigned long cookie = (unsigned long)vq->priv;

	if (cookie < HB_PIO_OFFSET + HB_PORT_FIRST || cookie > HB_PIO_OFFSET + HB_PORT_LAST || vq->index > 0xff)
		return 0;
	return hb_bell_checked((cookie - HB_PIO_OFFSET) << 8 | vq->index);
}

/* QueueSel is the driver's: only while its device is locked, that is, neither being set up nor torn down. */
static u32 hb_mmio_bell(void __iomem *mmio, const struct virtqueue *vq)
{
	u32 bell;

	writel(vq->index, mmio + VIRTIO_MMIO_QUEUE_SEL);
	bell = hb_bell_checked(readl(mmio + HB_MMIO_BELL));
	if (bell)
		writel(1, mmio + HB_MMIO_BELL);
	return bell;
}

/*
 * The device key: a device that was passed on from another level carries that level's key, which is not this
 * platform's. Other makes of virtio-mmio read 0 here.
 */
static void __iomem *hb_mmio_map(struct device *parent)
{
	struct resource *memory = platform_get_resource(to_platform_device(parent), IORESOURCE_MEM, 0);
	void __iomem *mmio;

	if (!memory || resource_size(memory) < HB_MMIO_SIZE)
		return NULL;
	mmio = ioremap(memory->start, HB_MMIO_SIZE);
	if (!mmio)
		return NULL;
	if (readl(mmio + VIRTIO_MMIO_MAGIC_VALUE) == HB_MMIO_MAGIC && readl(mmio + VIRTIO_MMIO_VERSION) == 2 &&
	    readl(mmio + HB_MMIO_KEY) == hb_platform_key())
		return mmio;
	iounmap(mmio);
	return NULL;
}

static void hb_scan_queues(struct hb_scan *scan, struct virtio_device *vdev, bool pci)
{
	struct virtqueue *vq;

	spin_lock(&vdev->vqs_list_lock);
	list_for_each_entry(vq, &vdev->vqs, list) {
		struct hb_queue *queue = hb_queue_claim(vq);
		u32 bell = 0;

		if (!queue)
			continue;
		if (scan->available && pci)
			bell = hb_pci_bell(vq);
		else if (scan->mmio)
			bell = hb_mmio_bell(scan->mmio, vq);
		queue->seen = scan->seen;
		hb_queue_settle(queue, bell);
	}
	spin_unlock(&vdev->vqs_list_lock);
}

static int hb_scan_device(struct device *device, void *data)
{
	struct hb_scan *scan = data;
	struct virtio_device *vdev;

	if (!is_virtio_device(device))
		return 0;
	if (!device_trylock(device)) {
		scan->busy = true;
		return 0;
	}
	vdev = dev_to_virtio(device);
	if (device->driver && vdev->config->get_status(vdev) & VIRTIO_CONFIG_S_DRIVER_OK)
		hb_scan_queues(scan, vdev, device->parent->bus != &platform_bus_type);
	device_unlock(device);
	return 0;
}

/*
 * Both locks are only tried: a probe that hangs must not hang this worker, and with it all other queues and the
 * unloading of this module.
 */
static int hb_scan_parent(struct device *parent, void *data)
{
	struct hb_scan *scan = data;

	if (!device_trylock(parent)) {
		scan->busy = true;
		return 0;
	}
	if (scan->available && parent->bus == &platform_bus_type)
		scan->mmio = hb_mmio_map(parent);
	device_for_each_child(parent, scan, hb_scan_device);
	if (scan->mmio) {
		iounmap(scan->mmio);
		scan->mmio = NULL;
	}
	device_unlock(parent);
	return 0;
}

static void hb_scan_work(struct work_struct *work)
{
	static unsigned long seen;
	struct hb_scan scan = {};
	unsigned long next;

	mutex_lock(&hb_queues_lock);
	hb_queues_reclaim();
	scan.seen = ++seen;
	if (hb_platform_look()) {
		hb_queues_disarm();
		if (!hb_platform_available())
			hb_platform_withdraw();
	}
	scan.available = hb_platform_available();
	if (hb_transports_walk(hb_scan_parent, &scan))
		scan.busy = true;
	if (scan.busy) {
		/* No sooner, even if a queue is due: it is the busy device's, and stays due as long as that is busy. */
		next = msecs_to_jiffies(HB_BUSY_MS);
	} else {
		hb_queues_sweep(scan.seen);
		next = hb_queues_next();
	}
	mutex_unlock(&hb_queues_lock);
	/* Not mod_delayed_work(): who wants the worker at once meanwhile shall have it at once. */
	if (next != MAX_JIFFY_OFFSET)
		queue_delayed_work(system_freezable_wq, &hb_scan_worker, next);
}

/*
 * hb_scan_soon - have the worker run; from any context but NMI
 */
void hb_scan_soon(void)
{
	mod_delayed_work(system_freezable_wq, &hb_scan_worker, 0);
}

/*
 * hb_scan_now - have the worker run, and wait for it
 * @by_hand: arm the queues that are waiting, too
 */
void hb_scan_now(bool by_hand)
{
	if (by_hand) {
		mutex_lock(&hb_queues_lock);
		hb_queues_hurry();
		mutex_unlock(&hb_queues_lock);
	}
	hb_scan_soon();
	flush_delayed_work(&hb_scan_worker);
}

/*
 * hb_scan_stop - the worker runs no more; nobody may ask for it any longer
 */
void hb_scan_stop(void)
{
	cancel_delayed_work_sync(&hb_scan_worker);
}
