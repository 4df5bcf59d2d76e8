/* What every test program here is made of. */
#ifndef NATIVE_CHECK_H
#define NATIVE_CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* Not assert(): these hold in every build, and the message says what was promised. */
#define CHECK(what)                                                                                                    \
	do {                                                                                                           \
		if (!(what)) {                                                                                         \
			fprintf(stderr, "%s:%d: %s: does not hold: %s\n", __FILE__, __LINE__, __func__, #what);        \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

#define EXIT_SKIPPED 77 /* what the program printed last says what this machine lacks */

#endif
