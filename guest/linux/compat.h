/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What has another name, place or type in one of the kernels that the module is built for, Linux 6.1 to 7.3. The module
 * uses what the newest has; here the older ones get that. Each entry says which kernel needs it.
 */
#ifndef HYPERBELL_COMPAT_H
#define HYPERBELL_COMPAT_H

#include <linux/device/bus.h>
#include <linux/device/driver.h>
#include <linux/ftrace.h>
#include <linux/version.h>

#include <asm/msr.h>
#include <asm/processor.h>

/* cpuid(): from 6.16 on asm/processor.h does not bring it along. */
#if __has_include(<asm/cpuid/api.h>)
#include <asm/cpuid/api.h>
#endif

/* The numbers of Hyper-V's interface: until 6.14 in the second file, which then was replaced by the first. */
#if __has_include(<hyperv/hvgdk.h>)
#include <hyperv/hvgdk.h>
#else
#include <asm/hyperv-tlfs.h>
#endif

/* Until 6.15 a register of 64 bits was "l" (long), not "q" (quad). */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
#define rdmsrq_safe rdmsrl_safe
#define wrmsrq_safe wrmsrl_safe
#endif

/* 6.1 has it by its old name, which says nothing of the registers. */
#ifndef ftrace_regs_set_instruction_pointer
#define ftrace_regs_set_instruction_pointer ftrace_instruction_pointer_set
#endif

/* In 6.12 all buses are const; 6.1's driver_find() asks for one that is not, and does not change it either. */
static inline struct device_driver *hb_driver_find(const char *name, const struct bus_type *bus)
{
	return driver_find(name, (struct bus_type *)bus);
}

#endif
