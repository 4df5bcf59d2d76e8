/* The split ring where its pages are scattered: see ring_area.h. */
#define RING_SCATTERED
#include "split.c"
