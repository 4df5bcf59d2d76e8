/* What the host reads: lines "RESULT key=value" on port 0xe9, and the exit status on port 0xf4. */
#ifndef TOY_REPORT_H
#define TOY_REPORT_H

#include <stdint.h>

/* "RESULT " and the text and a line's end. Knows %s, %u, %x, %llx and %%; no widths. */
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* "RESULT error=" and the text, which names the place; the exit status will be 1. Answers -1, for the caller to pass on. */
int report_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The end: 0 without an error, 1 with. */
void report_exit(void) __attribute__((noreturn));

#endif
