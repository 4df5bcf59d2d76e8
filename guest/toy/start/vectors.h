/* What start.S and interrupts.c must agree on. Read by the assembler too: nothing but #define. */
#ifndef TOY_VECTORS_H
#define TOY_VECTORS_H

#define CODE_SELECTOR 0x08
#define DATA_SELECTOR 0x10
#define CODE64_SELECTOR 0x18

#define VECTORS 64
#define STUB_BYTES 16
#define ERROR_CODE_VECTORS 0x20227d00 /* of the exceptions: 8, 10 to 14, 17, 21, 29 */

#define VECTOR_TIMER 32
#define VECTOR_DEVICE 40 /* of the first device */
#define VECTOR_SPURIOUS 63

#endif
