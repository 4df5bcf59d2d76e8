// SPDX-License-Identifier: GPL-2.0
/*
 * What the administrator sees: totals, the reason and the re-arm switch in /sys/kernel/hyperbell, the table of queues
 * in debugfs.
 */
#include <linux/debugfs.h>
#include <linux/jiffies.h>
#include <linux/kobject.h>
#include <linux/kstrtox.h>
#include <linux/seq_file.h>
#include <linux/sysfs.h>

#include "hyperbell.h"

static struct kobject *hb_kobject;
static struct dentry *hb_debugfs;

static ssize_t available_show(struct kobject *kobject, struct kobj_attribute *attribute, char *page)
{
	return sysfs_emit(page, "%d\n", hb_platform_available());
}

static ssize_t reason_show(struct kobject *kobject, struct kobj_attribute *attribute, char *page)
{
	return hb_platform_describe(page);
}

static ssize_t hooks_show(struct kobject *kobject, struct kobj_attribute *attribute, char *page)
{
	return hb_transports_describe(page);
}

static ssize_t hypercall_show(struct kobject *kobject, struct kobj_attribute *attribute, char *page)
{
	return sysfs_emit(page, "%llu\n", hb_totals_sum().hypercall);
}

static ssize_t plain_show(struct kobject *kobject, struct kobj_attribute *attribute, char *page)
{
	return sysfs_emit(page, "%llu\n", hb_totals_sum().plain);
}

static ssize_t refused_show(struct kobject *kobject, struct kobj_attribute *attribute, char *page)
{
	return sysfs_emit(page, "%llu\n", hb_totals_sum().refused);
}

static ssize_t rearm_store(struct kobject *kobject, struct kobj_attribute *attribute, const char *text, size_t size)
{
	bool on;

	if (kstrtobool(text, &on) || !on)
		return -EINVAL;
	hb_scan_now(true);
	return size;
}

static struct kobj_attribute hb_available_attribute = __ATTR_RO(available);
static struct kobj_attribute hb_reason_attribute = __ATTR_RO(reason);
static struct kobj_attribute hb_hooks_attribute = __ATTR_RO(hooks);
static struct kobj_attribute hb_hypercall_attribute = __ATTR_RO(hypercall);
static struct kobj_attribute hb_plain_attribute = __ATTR_RO(plain);
static struct kobj_attribute hb_refused_attribute = __ATTR_RO(refused);
static struct kobj_attribute hb_rearm_attribute = __ATTR_WO(rearm);

static struct attribute *hb_attributes[] = {
	&hb_available_attribute.attr,
	&hb_reason_attribute.attr,
	&hb_hooks_attribute.attr,
	&hb_hypercall_attribute.attr,
	&hb_plain_attribute.attr,
	&hb_refused_attribute.attr,
	&hb_rearm_attribute.attr,
	NULL,
};

static const struct attribute_group hb_attribute_group = { .attrs = hb_attributes };

static void hb_show_queue(struct seq_file *file, const struct hb_queue *queue)
{
	static const char *const states[] = {
		[HB_PLAIN] = "plain",
		[HB_ARMED] = "armed",
		[HB_REFUSED] = "refused",
		[HB_WAITING] = "waiting",
	};
	int state = atomic_read(&queue->state);
	long left = (long)(queue->due - jiffies);

	seq_printf(file, "%s %u ", queue->device, queue->index);
	if (queue->bell)
		seq_printf(file, "%06x ", queue->bell);
	else
		seq_puts(file, "- ");
	seq_printf(file, "%s %lld %lld %lld ", states[state], (s64)atomic64_read(&queue->hypercall),
		   (s64)atomic64_read(&queue->plain), (s64)atomic64_read(&queue->refused));
	if (state == HB_WAITING)
		seq_printf(file, "%u\n", left > 0 ? jiffies_to_msecs(left) : 0);
	else
		seq_puts(file, "-\n");
}

static int queues_show(struct seq_file *file, void *unused)
{
	unsigned int i;

	seq_puts(file, "device queue bell state hypercall plain refused rearm_ms\n");
	mutex_lock(&hb_queues_lock);
	for (i = 0; i < HB_QUEUES; i++)
		if (READ_ONCE(hb_queues[i].vq))
			hb_show_queue(file, &hb_queues[i]);
	mutex_unlock(&hb_queues_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(queues);

int hb_show_start(void)
{
	int error;

	hb_kobject = kobject_create_and_add("hyperbell", kernel_kobj);
	if (!hb_kobject)
		return -ENOMEM;
	error = sysfs_create_group(hb_kobject, &hb_attribute_group);
	if (error) {
		kobject_put(hb_kobject);
		return error;
	}
	hb_debugfs = debugfs_create_dir("hyperbell", NULL);
	debugfs_create_file("queues", 0400, hb_debugfs, NULL, &queues_fops);
	return 0;
}

/*
 * hb_show_stop - nobody reads or writes any of it after this
 */
void hb_show_stop(void)
{
	debugfs_remove_recursive(hb_debugfs);
	sysfs_remove_group(hb_kobject, &hb_attribute_group);
	kobject_put(hb_kobject);
}
