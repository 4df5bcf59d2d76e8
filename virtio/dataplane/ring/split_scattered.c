/* The split ring where its pages are scattered: see ring/area.h. */
#define RING_SCATTERED
#include "ring/split.c"
