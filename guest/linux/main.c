// SPDX-License-Identifier: GPL-2.0
/*
 * hyperbell - ring virtio queues by a hypercall that ends in an eventfd in the host's kernel
 *
 * An optimization only. A queue that cannot or may not be rung so keeps its plain doorbell, and the module loads and
 * counts kicks where the hypervisor offers nothing.
 */
#include <linux/module.h>

#include "hyperbell.h"

static int __init hb_init(void)
{
	int error;

	hb_platform_look();
	error = hb_show_start();
	if (error)
		goto err_platform;
	error = hb_hooks_start();
	if (error)
		goto err_show;
	hb_scan_now(false);
	return 0;

err_show:
	hb_show_stop();
	hb_scan_stop();
err_platform:
	hb_platform_withdraw();
	return error;
}

/* In this order: what asks for work, what is asked, and GUEST_OS_ID when nobody rings any more. */
static void __exit hb_exit(void)
{
	hb_show_stop();
	hb_hooks_stop();
	hb_kick_quiesce();
	hb_scan_stop();
	hb_platform_withdraw();
}

module_init(hb_init);
module_exit(hb_exit);

MODULE_AUTHOR("The hyperbell authors");
MODULE_DESCRIPTION("Hypercall doorbell for virtio queues");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
