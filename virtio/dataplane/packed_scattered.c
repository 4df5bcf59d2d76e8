/* The packed ring where its pages are scattered: see ring_area.h. */
#define RING_SCATTERED
#include "packed.c"
