// SPDX-License-Identifier: GPL-2.0
/*
 * How the module gets at kicks and at devices being set up: ftrace, on functions of the two virtio transports.
 *
 * Only the kick's course is ever changed, and only to skip the driver's function once the queue has been rung. What a
 * device is told of its status is merely watched. So there is nothing here that copies what a driver does, or that
 * knows its private structures.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ftrace.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/rcupdate.h>
#include <linux/string.h>
#include <linux/virtio_config.h>

#include <asm/pgtable.h>

#include "compat.h"
#include "hyperbell.h"

/* One per hooked function. */
struct hb_hook {
	struct ftrace_ops ops;
	const struct hb_transport *transport;
};

static void hb_notify_entered(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			      struct ftrace_regs *fregs);
static void hb_status_entered(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			      struct ftrace_regs *fregs);

static bool hb_hooks_stopped;

/* Those of each transport. */
static struct hb_transport_hooks {
	struct hb_hook notify;
	struct hb_hook status;
} hb_hooks[HB_TRANSPORTS] = {
	[0 ... HB_TRANSPORTS - 1] = {
		.notify.ops = {
			.func = hb_notify_entered,
			.flags = FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY,
		},
		.status.ops = { .func = hb_status_entered, .flags = FTRACE_OPS_FL_SAVE_REGS },
	},
};

/* What runs instead of the driver's function when the queue has been rung. */
static noinline bool hb_rung(struct virtqueue *vq)
{
	return true;
}

/*
 * ftrace knows functions by name; another module's function may have the same. The kernel exports no way to ask whether
 * an address is its own, but its image ends where the modules' space begins.
 */
static __always_inline bool hb_hook_is(const struct hb_hook *hook, unsigned long ip)
{
	const struct module *owner = hook->transport->owner;

	return owner ? within_module(ip, owner) : ip < MODULES_VADDR;
}

static void notrace hb_notify_entered(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
				      struct ftrace_regs *fregs)
{
	const struct hb_hook *hook = container_of(ops, struct hb_hook, ops);
	struct pt_regs *regs = ftrace_get_regs(fregs);

	if (regs && hb_hook_is(hook, ip) && hb_kick((struct virtqueue *)regs->di))
		ftrace_regs_set_instruction_pointer(fregs, (unsigned long)hb_rung);
}

static void notrace hb_status_entered(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
				      struct ftrace_regs *fregs)
{
	const struct hb_hook *hook = container_of(ops, struct hb_hook, ops);
	struct pt_regs *regs = ftrace_get_regs(fregs);
	u8 status;

	if (!regs || !hb_hook_is(hook, ip))
		return;
	/*
	 * The worker needs the device's lock, so it comes after what goes on here. A device that has been reset hears
	 * of its next status before any queue of it is made anew.
	 */
	status = (u8)regs->si;
	if ((status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED)) == VIRTIO_CONFIG_S_DRIVER_OK)
		hb_scan_soon();
	else
		hb_queues_forget((struct virtio_device *)regs->di);
}

/*
 * A hook is set again when its transport is loaded again. The filter of the last time is still there then, and is freed
 * by ftrace_set_filter(). It must not be freed any sooner: Linux 6.1's ftrace_free_filter() leaves the ops pointing at
 * what it has freed, and ftrace_set_filter() would free it a second time.
 */
static int hb_hook_set(struct hb_hook *hook, const struct hb_transport *transport, const char *function)
{
	int error;

	hook->transport = transport;
	/* Without a filter the hook would be on every function of the kernel: no registering after a failure here. */
	error = ftrace_set_filter(&hook->ops, (unsigned char *)function, strlen(function), 1);
	if (!error)
		error = register_ftrace_function(&hook->ops);
	if (error)
		pr_warn("%s: %s() cannot be hooked (%d); its queues keep their plain doorbell\n", transport->module,
			function, error);
	return error;
}

/* The status first: a queue must not be armed while nobody watches whether its device is reset. */
static void hb_transport_hook(struct hb_transport *transport, struct module *owner)
{
	struct hb_transport_hooks *hooks = &hb_hooks[transport - hb_transports];

	lockdep_assert_held(&hb_transports_lock);
	if (transport->hooked || hb_hooks_stopped)
		return;
	transport->owner = owner;
	if (hb_hook_set(&hooks->status, transport, transport->status))
		return;
	if (hb_hook_set(&hooks->notify, transport, transport->notify)) {
		unregister_ftrace_function(&hooks->status.ops);
		return;
	}
	transport->hooked = true;
}

static void hb_transport_unhook(struct hb_transport *transport)
{
	struct hb_transport_hooks *hooks = &hb_hooks[transport - hb_transports];

	lockdep_assert_held(&hb_transports_lock);
	if (!transport->hooked)
		return;
	unregister_ftrace_function(&hooks->notify.ops);
	unregister_ftrace_function(&hooks->status.ops);
	transport->hooked = false;
}

/* A transport is loaded (and has no device yet) or goes away (and has none any more). */
static int hb_module_changed(struct notifier_block *block, unsigned long state, void *data)
{
	struct module *module = data;
	unsigned int i;

	if (state != MODULE_STATE_COMING && state != MODULE_STATE_GOING)
		return NOTIFY_DONE;
	mutex_lock(&hb_transports_lock);
	for (i = 0; i < HB_TRANSPORTS; i++) {
		struct hb_transport *transport = &hb_transports[i];

		if (strcmp(module->name, transport->module))
			continue;
		if (state == MODULE_STATE_COMING)
			hb_transport_hook(transport, module);
		else
			hb_transport_unhook(transport);
	}
	mutex_unlock(&hb_transports_lock);
	return NOTIFY_DONE;
}

static struct notifier_block hb_module_notifier = { .notifier_call = hb_module_changed };

/*
 * hb_hooks_start - hook the transports that are there, and those that will come
 */
int hb_hooks_start(void)
{
	unsigned int i;
	int error;

	error = register_module_notifier(&hb_module_notifier);
	if (error)
		return error;
	mutex_lock(&hb_transports_lock);
	for (i = 0; i < HB_TRANSPORTS; i++) {
		struct device_driver *driver = hb_transport_driver_get(&hb_transports[i]);

		if (!driver)
			continue;
		hb_transport_hook(&hb_transports[i], driver->owner);
		hb_transport_driver_put(driver);
	}
	mutex_unlock(&hb_transports_lock);
	return 0;
}

/*
 * hb_hooks_stop - from here on every kick is the driver's alone, and no CPU is inside this module for one
 */
void hb_hooks_stop(void)
{
	unsigned int i;

	/*
	 * The notifier goes last: a transport that is unloaded meanwhile must wait until its functions are unhooked.
	 * Else their addresses stay in the hooks, and ftrace shuts itself off when another module is loaded there.
	 */
	mutex_lock(&hb_transports_lock);
	hb_hooks_stopped = true;
	for (i = 0; i < HB_TRANSPORTS; i++)
		hb_transport_unhook(&hb_transports[i]);
	mutex_unlock(&hb_transports_lock);
	unregister_module_notifier(&hb_module_notifier);
	for (i = 0; i < HB_TRANSPORTS; i++) {
		ftrace_free_filter(&hb_hooks[i].notify.ops);
		ftrace_free_filter(&hb_hooks[i].status.ops);
	}
	/*
	 * A task may have been preempted between ftrace's trampoline and the end of hb_rung(). None sleeps there of its
	 * own will, so once every task has done that, or was in user space, none is left; the second wait is for what
	 * interrupted the idle tasks, which the first does not count.
	 */
	synchronize_rcu_tasks();
	synchronize_rcu_tasks_rude();
}
