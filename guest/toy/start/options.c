/* Parses the command line, which start_info points at. */
#include "start/options.h"

#include "start/report.h"

#define START_MAGIC 0x336ec578

/* Xen's public interface, "struct hvm_start_info", version 0 and later: what is used of it. */
struct start_info {
	uint32_t magic;
	uint32_t version;
	uint32_t flags;
	uint32_t module_count;
	uint64_t modules_gpa;
	uint64_t command_line_gpa;
};

struct choice {
	const char *name;
	uint32_t value;
};

struct key {
	const char *name;
	uint32_t *value;
	const struct choice *choices; /* NULL: a number */
};

struct options options = {
	.doorbell = DOORBELL_AUTO,
	.plain = DOORBELL_MMIO,
	.requests = 16,
	.every = 100,
	.seed = 1,
	.patience = 10,
};

static const struct choice doorbells[] = {
	{ "mmio", DOORBELL_MMIO },
	{ "pio", DOORBELL_PIO },
	{ "hypercall", DOORBELL_HYPERCALL },
	{ "auto", DOORBELL_AUTO },
	{ 0 },
};
static const struct choice plain_doorbells[] = { { "mmio", DOORBELL_MMIO }, { "pio", DOORBELL_PIO }, { 0 } };
static const struct choice nets[] = { { "none", NET_NONE }, { "reflect", NET_REFLECT }, { "drop", NET_DROP }, { 0 } };
static const struct choice modes[] = {
	{ "check", MODE_CHECK },     { "nonsense", MODE_NONSENSE }, { "flood", MODE_FLOOD },
	{ "outside", MODE_OUTSIDE }, { "loop", MODE_LOOP },	    { "reset", MODE_RESET },
	{ 0 },
};
static const struct key keys[] = {
	{ "doorbell", &options.doorbell, doorbells },
	{ "plain", &options.plain, plain_doorbells },
	{ "net", &options.net, nets },
	{ "mode", &options.mode, modes },
	{ "requests", &options.requests, 0 },
	{ "every", &options.every, 0 },
	{ "rearm", &options.rearm, 0 },
	{ "seed", &options.seed, 0 },
	{ "patience", &options.patience, 0 },
	{ "event_idx", &options.event_idx, 0 },
	{ "lenient", &options.lenient, 0 },
};

static bool word_ends(char character)
{
	return !character || character == ' ';
}

/* The text behind ``prefix`` if ``text`` begins with it, else NULL. */
static const char *text_behind(const char *text, const char *prefix)
{
	while (*prefix) {
		if (*text++ != *prefix++)
			return 0;
	}
	return text;
}

/* Decimal, or hexadecimal behind 0x; the end of the number, or NULL if there is none. */
static const char *number_parse(const char *text, uint32_t *value)
{
	const char *digits = text_behind(text, "0x");
	uint32_t base = digits ? 16 : 10, digit;
	const char *at = digits ? digits : text, *begin = at;

	for (*value = 0;; at++) {
		if (*at >= '0' && *at <= '9')
			digit = (uint32_t)(*at - '0');
		else if (base == 16 && (*at | 0x20) >= 'a' && (*at | 0x20) <= 'f')
			digit = (uint32_t)((*at | 0x20) - 'a' + 10);
		else
			break;
		*value = *value * base + digit;
	}
	return at == begin ? 0 : at;
}

static int device_parse(const char *text)
{
	struct device_option *device;
	uint32_t *fields[4];
	unsigned int field;

	if (options.device_count == OPTIONS_DEVICES)
		return report_error("command line: more than %u devices", (uint32_t)OPTIONS_DEVICES);
	device = &options.devices[options.device_count++];
	fields[0] = &device->id;
	fields[1] = &device->base;
	fields[2] = &device->gsi;
	fields[3] = &device->port;
	for (field = 0; field < 4; field++) {
		text = number_parse(text, fields[field]);
		if (!text || !(field < 3 ? *text == ':' : word_ends(*text)))
			return report_error("command line: device= wants ID:BASE:GSI:PORT");
		text++;
	}
	return 0;
}

static int value_parse(const struct key *key, const char *text)
{
	const struct choice *choice;
	const char *end;

	if (!key->choices) {
		end = number_parse(text, key->value);
		return end && word_ends(*end) ? 0 : report_error("command line: %s= wants a number", key->name);
	}
	for (choice = key->choices; choice->name; choice++) {
		end = text_behind(text, choice->name);
		if (end && word_ends(*end)) {
			*key->value = choice->value;
			return 0;
		}
	}
	return report_error("command line: %s= has a value that this program does not know", key->name);
}

static int word_parse(const char *text)
{
	const char *value = text_behind(text, "device=");
	unsigned int i;

	if (value)
		return device_parse(value);
	for (i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
		value = text_behind(text, keys[i].name);
		if (value && *value == '=')
			return value_parse(&keys[i], value + 1);
	}
	return 0;
}

int options_parse(uint32_t start_info_gpa)
{
	const struct start_info *start_info = (const struct start_info *)(uintptr_t)start_info_gpa;
	const char *text;

	if (start_info->magic != START_MAGIC)
		return report_error("start: EBX does not point at PVH's start_info (magic 0x%x)", start_info->magic);
	text = (const char *)(uintptr_t)start_info->command_line_gpa;
	while (text && *text) {
		if (*text == ' ') {
			text++;
			continue;
		}
		if (word_parse(text))
			return -1;
		while (!word_ends(*text))
			text++;
	}
	if (!options.every)
		return report_error("command line: every= cannot be 0");
	if (!options.device_count)
		return report_error("command line: no device=ID:BASE:GSI:PORT");
	return 0;
}
