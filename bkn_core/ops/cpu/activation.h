/* The passes over the values of an activation in two layouts: planes (channels first: all positions of one channel lie
   together) and rows (channels last: all channels of one position lie together). They are written once, in `planes.h` and
   `rows.h`, and compiled for each type of values; all computing is in float32.

   Statistics are summed in blocks: in planes each about its own mean, and merged in float64 by the update of Chan, Golub
   and LeVeque; in rows, where a block would be summed twice for that, about one centre. */

#pragma once

#include <float.h>

#include "calls.h"
#include "parallel.h"

enum { BLOCK = 8192, ROW = 256, LINES = 512, SAMPLE = 16, SHORT = 2048, CACHE_LINE = 64 };
static const float LARGEST = 0.499f * FLT_MAX; /* squares stay below, so that neither two of them nor 0 times one make a NaN */

typedef struct Moments {
    double count, mean, m2;
} Moments;

static inline void merge(Moments *into, double count, double mean, double m2)
{
    double total = into->count + count, difference = mean - into->mean;
    into->m2 += m2 + difference * difference * into->count * count / total;
    into->mean += difference * count / total;
    into->count = total;
}

/* The passes for one type of values, of which `x`, `y`, `dy` and `dx` are. */
typedef struct Passes {
    int64_t size; /* bytes of a value */
    void (*observe_plane)(const void *x, int64_t count, Moments *moments);
    void (*apply_plane)(const void *x, void *y, int64_t count, const float *k);
    void (*sums_of_plane)(const void *dy, const void *x, int64_t count, float centre, double *sums);
    void (*gradient_of_plane)(const void *dy, const void *x, void *dx, int64_t count, const float *k);
    /* The first two return whether they found no memory; the last two take coefficients that `spread` has laid out. */
    int (*observe_rows)(const void *x, int64_t rows, int64_t channels, Moments *moments);
    int (*sums_of_rows)(const void *dy, const void *x, int64_t rows, int64_t channels, const float *centre, double *sums);
    void (*apply_rows)(const void *x, void *y, int64_t values, int64_t width, const float *k);
    void (*gradient_of_rows)(const void *dy, const void *x, void *dx, int64_t values, int64_t width, const float *k);
} Passes;

extern const Passes bkn_float32, bkn_bfloat16, bkn_float16;

static inline const Passes *passes_for(int64_t type)
{
    return type == BFLOAT16 ? &bkn_bfloat16 : type == FLOAT16 ? &bkn_float16 : &bkn_float32;
}

static inline void *value_at(const Passes *passes, const void *values, int64_t i)
{
    return (char *)values + i * passes->size;
}

/* Ask for a plane that is read next, where planes are so short (in bytes) that the machine does not foresee it. */
static inline void fetch(const Passes *passes, const void *values, int64_t i, int64_t count)
{
    const char *plane = value_at(passes, values, i);
    int64_t bytes = count * passes->size;
    for (int64_t at = 0; bytes <= SHORT && at < bytes; at += CACHE_LINE)
        __builtin_prefetch(plane + at);
}

/* Rows are taken `width` values (some rows) at a time, so that few channels vectorize too. */
static inline int64_t width_of(int64_t channels)
{
    return channels >= ROW || channels % 16 == 0 ? channels : ROW / channels * channels;
}

static inline void spread(const float *values, int64_t channels, float *row, int64_t width)
{
    for (int64_t i = 0; i < width; i++)
        row[i] = i < channels ? values[i] : row[i - channels];
}

/* Channels last: the rows of all groups are cut into stretches, several to a group where threads outnumber groups. */
static inline void stretch(int64_t rows, int64_t parts, int64_t i, int64_t *start, int64_t *count)
{
    int64_t g = i / parts, p = i % parts;
    *start = g * rows + rows * p / parts;
    *count = g * rows + rows * (p + 1) / parts - *start;
}
