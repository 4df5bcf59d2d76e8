/* What comes from outside: our variables, which end here, QEMU's command line, and the way to the operator's eyes. */
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "preload.h"

#define VARIABLE_SOCKET "HYPERBELL_SOCKET"
#define VARIABLE_KEY "HYPERBELL_KEY"
#define VARIABLE_NAME "HYPERBELL_VM"
#define VARIABLE_PRELOAD "LD_PRELOAD"
#define SEPARATORS ": "

/* One line for the operator; lost when nobody reads what QEMU says: none of QEMU's threads waits for that. */
void say(const char *format, ...)
{
	struct pollfd output = { .fd = STDERR_FILENO, .events = POLLOUT };
	char line[512];
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	if (length > 0 && poll(&output, 1, 0) > 0 && output.revents & POLLOUT)
		dprintf(STDERR_FILENO, "hyperbell: %s\n", line);
}

static bool parse_key(const char *text, uint32_t *key)
{
	unsigned long value;
	char *end;

	/* strtoul would take signs, spaces and 0x too. */
	if (!*text || strlen(text) > 6 || strspn(text, "0123456789abcdefABCDEF") != strlen(text))
		return false;
	value = strtoul(text, &end, 16);
	*key = (uint32_t)value;
	return !*end && value && value <= KEY_MASK;
}

static bool is_this_library(const char *entry)
{
	struct stat own, other;
	Dl_info info;

	if (!dladdr((const void *)say, &info) || !info.dli_fname)
		return false;
	if (!strcmp(entry, info.dli_fname))
		return true;
	return strchr(entry, '/') && !stat(entry, &other) && !stat(info.dli_fname, &own) &&
	       own.st_dev == other.st_dev && own.st_ino == other.st_ino;
}

/* Children must not be preloaded: take our entry out of LD_PRELOAD and leave the others. */
static void leave_preload(void)
{
	const char *preload = getenv(VARIABLE_PRELOAD);
	char *copy, *kept, *place, *entry;

	if (!preload)
		return;
	copy = strdup(preload);
	kept = calloc(1, strlen(preload) + 2);
	if (copy && kept) {
		for (entry = strtok_r(copy, SEPARATORS, &place); entry; entry = strtok_r(NULL, SEPARATORS, &place)) {
			if (is_this_library(entry))
				continue;
			if (*kept)
				strcat(kept, ":");
			strcat(kept, entry);
		}
		if (*kept)
			setenv(VARIABLE_PRELOAD, kept, 1);
		else
			unsetenv(VARIABLE_PRELOAD);
	}
	free(copy);
	free(kept);
}

/* What the environment says, once; after that the environment says nothing of us any more. The lock is held. */
const struct settings *settings_take(void)
{
	static struct settings settings;
	static bool taken;
	const char *path, *key, *name;

	if (taken)
		return &settings;
	taken = true;
	path = getenv(VARIABLE_SOCKET);
	key = getenv(VARIABLE_KEY);
	name = getenv(VARIABLE_NAME);
	if (!path || !*path) {
		say("%s names no socket: the VM keeps its plain doorbells", VARIABLE_SOCKET);
	} else if (strlen(path) >= sizeof(settings.socket)) {
		say("%s is %zu bytes long, the path of a Unix socket has room for %zu: the VM keeps its plain doorbells: %s",
		    VARIABLE_SOCKET, strlen(path), sizeof(settings.socket) - 1, path);
	} else {
		strcpy(settings.socket, path);
		settings.active = true;
	}
	if (key) {
		settings.has_key = parse_key(key, &settings.key);
		settings.key_is_wrong = !settings.has_key;
	}
	if (name && strlen(name) < sizeof(settings.name))
		strcpy(settings.name, name);
	leave_preload();
	unsetenv(VARIABLE_SOCKET);
	unsetenv(VARIABLE_KEY);
	unsetenv(VARIABLE_NAME);
	return &settings;
}

/* Whether QEMU was started for an incoming migration or from a snapshot; true when that cannot be told. */
bool vm_is_incoming(void)
{
	static const char *const options[] = { "-incoming", "--incoming", "-loadvm", "--loadvm" };
	FILE *file = fopen("/proc/self/cmdline", "re");
	char *argument = NULL;
	size_t room = 0;
	bool found = false;

	if (!file)
		return true;
	while (!found && getdelim(&argument, &room, '\0', file) >= 0)
		for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++)
			found |= !strcmp(argument, options[i]);
	found |= ferror(file) != 0;
	free(argument);
	fclose(file);
	return found;
}
