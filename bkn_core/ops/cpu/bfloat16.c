/* The passes over bfloat16, the upper half of a float32. */

#include "activation.h"
#include "bits.h"

typedef uint16_t Element;

static inline float load(Element value)
{
    return of_bits((uint32_t)value << 16);
}

/* To the nearest, of two to the even one; NaN stays NaN. */
static inline Element store(float value)
{
    uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (Element)(value != value ? 0x7fc0 : rounded);
}

#define PASSES bkn_bfloat16
#include "planes.h"
#include "rows.h"
