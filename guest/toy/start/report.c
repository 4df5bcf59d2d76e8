/* Lines on the debug port, without a C library, and the exit. */
#include "start/report.h"

#include <stdarg.h>

#include "start/cpu.h"

#define PORT_CONSOLE 0xe9
#define PORT_EXIT 0xf4
#define ERRORS_MAX 20 /* after that many lines the reader has seen enough */

static uint32_t errors;

static void put_character(char character)
{
	port_write8(PORT_CONSOLE, (uint8_t)character);
}

static void put_text(const char *text)
{
	while (*text)
		put_character(*text++);
}

static void put_decimal(uint32_t value)
{
	char digits[11];
	unsigned int at = sizeof(digits) - 1;

	digits[at] = '\0';
	do {
		digits[--at] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	put_text(&digits[at]);
}

static void put_hex(uint64_t value)
{
	unsigned int shift = 60;

	while (shift && !(value >> shift & 0xf))
		shift -= 4;
	for (;; shift -= 4) {
		put_character("0123456789abcdef"[value >> shift & 0xf]);
		if (!shift)
			break;
	}
}

static void put_formatted(const char *format, va_list arguments)
{
	for (; *format; format++) {
		if (*format != '%') {
			put_character(*format);
			continue;
		}
		switch (*++format) {
		case 's':
			put_text(va_arg(arguments, const char *));
			break;
		case 'u':
			put_decimal(va_arg(arguments, uint32_t));
			break;
		case 'x':
			put_hex(va_arg(arguments, uint32_t));
			break;
		case 'l': /* llx: there is no other long */
			format += 2;
			put_hex(va_arg(arguments, uint64_t));
			break;
		default:
			put_character(*format);
		}
	}
}

void report(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	put_text("RESULT ");
	put_formatted(format, arguments);
	put_character('\n');
	va_end(arguments);
}

int report_error(const char *format, ...)
{
	va_list arguments;

	if (++errors > ERRORS_MAX)
		return -1;
	va_start(arguments, format);
	put_text("RESULT error=");
	put_formatted(format, arguments);
	put_character('\n');
	va_end(arguments);
	return -1;
}

void report_exit(void)
{
	report("errors=%u", errors);
	port_write8(PORT_EXIT, errors ? 1 : 0);
	for (;;) { /* nobody listens at the port: at least be quiet */
		interrupts_disable();
		asm volatile("hlt");
	}
}
