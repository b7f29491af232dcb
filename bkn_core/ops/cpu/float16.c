/* The passes over float16, whose exponent has 5 bits: 0 means that values are evenly spaced, 31 infinity and NaN. All
   cases are computed and one is chosen, since a branch would not vectorize. */

#include "activation.h"
#include "bits.h"

typedef uint16_t Element;

/* All ones where a < b, else 0; both below 2³¹. */
static inline uint32_t below(uint32_t a, uint32_t b)
{
    return (uint32_t)((int32_t)(a - b) >> 31);
}

static inline uint32_t choose(uint32_t mask, uint32_t a, uint32_t b)
{
    return (a & mask) | (b & ~mask);
}

/* Evenly spaced values are so in float32 between ½ and 1. */
static inline float load(Element value)
{
    uint32_t size = value & 0x7fff, sign = (uint32_t)(value >> 15) << 31;
    uint32_t large = (size << 13) + choose(below(size, 31 << 10), 112u << 23, 224u << 23);
    uint32_t small = bits_of(of_bits(0x3f000000 | size) - 0.5f);
    return of_bits(sign | choose(below(size, 1 << 10), small, large));
}

/* To the nearest, of two to the even one; from 65520 on infinity; NaN stays NaN. */
static inline Element store(float value)
{
    uint32_t bits = bits_of(value), size = bits & 0x7fffffff;
    uint32_t large = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    uint32_t small = bits_of(of_bits(size) + 0.5f) - 0x3f000000;
    uint32_t finite = choose(below(size, 113u << 23), small, large);
    uint32_t made = choose(below(size, 143u << 23), finite, 31 << 10) | (below(0x7f800000, size) & 0x200);
    return (Element)(bits >> 31 << 15 | made);
}

#define PASSES bkn_float16
#include "planes.h"
#include "rows.h"
