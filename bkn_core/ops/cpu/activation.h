/* The passes over the values of an activation, float32, in two layouts: planes (channels first: all positions of one
   channel lie together) and rows (channels last: all channels of one position lie together).

   Statistics are summed in blocks: in planes each about its own mean, and merged in float64 by the update of Chan, Golub
   and LeVeque; in rows, where a block would be summed twice for that, about one centre. */

#pragma once

#include <float.h>

#include "parallel.h"

enum { BLOCK = 8192, ROW = 256, LINES = 512, SAMPLE = 16 };
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

/* Every `step`-th value, where the squares of a block have left the range of float32. */
static void observe_widely(const float *x, int64_t count, int64_t step, Moments *moments)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; i++)
        sum += x[i * step];
    for (int64_t i = 0; i < count; i++) {
        double d = x[i * step] - sum / (double)count;
        squares += d * d;
    }
    merge(moments, (double)count, sum / (double)count, squares);
}

VECTORIZED static inline void observe_plane(const float *x, int64_t count, Moments *moments)
{
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t n = count - start < BLOCK ? count - start : BLOCK;
        const float *v = x + start;
        float sum = 0, rest = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++)
            sum += v[i];
        float mean = sum / (float)n;
#pragma omp simd reduction(+ : rest, squares)
        for (int64_t i = 0; i < n; i++) {
            float d = v[i] - mean;
            rest += d;
            squares += d * d;
        }
        if (squares <= FLT_MAX)
            merge(moments, (double)n, mean + (double)rest / n, squares - (double)rest * rest / n);
        else
            observe_widely(v, n, 1, moments);
    }
}

VECTORIZED static inline void apply_plane(const float *x, float *y, int64_t count, const float *k)
{
    float scale = k[0], mean = k[1], bias = k[2];
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        y[i] = scale * (x[i] - mean) + bias;
}

VECTORIZED static inline void sums_of_plane(const float *dy, const float *x, int64_t count, float centre, double *sums)
{
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t n = count - start < BLOCK ? count - start : BLOCK;
        const float *g = dy + start, *v = x + start;
        float total = 0, weighted = 0;
#pragma omp simd reduction(+ : total, weighted)
        for (int64_t i = 0; i < n; i++) {
            total += g[i];
            weighted += g[i] * (v[i] - centre);
        }
        sums[0] += total;
        sums[1] += weighted;
    }
}

VECTORIZED static inline void gradient_of_plane(const float *dy, const float *x, float *dx, int64_t count, const float *k)
{
    float a = k[0], b = k[1], mean = k[2], c = k[3];
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        dx[i] = a * dy[i] + (b * (x[i] - mean) + c);
}

/* ---- the same for rows of channels; `width` values (some rows) at a time, so that few channels vectorize too ---- */

static inline int64_t width_of(int64_t channels)
{
    return channels >= ROW || channels % 16 == 0 ? channels : ROW / channels * channels;
}

static inline void spread(const float *values, int64_t channels, float *row, int64_t width)
{
    for (int64_t i = 0; i < width; i++)
        row[i] = i < channels ? values[i] : row[i - channels];
}

static inline double folded(const double *row, int64_t channel, int64_t channels, int64_t width)
{
    double sum = 0;
    for (int64_t i = channel; i < width; i += channels)
        sum += row[i];
    return sum;
}

/* Sums go down the rows four at a time, each row in the order of memory. */
VECTORIZED static inline void add_centred_rows(
    const float *restrict x, int64_t values, int64_t width, const float *restrict centre, float *restrict rest,
    float *restrict squares)
{
    int64_t start = 0;
    for (; start + 4 * width <= values; start += 4 * width) {
        const float *v = x + start;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float m = centre[i];
            float d0 = v[i] - m, d1 = v[i + width] - m, d2 = v[i + 2 * width] - m, d3 = v[i + 3 * width] - m;
            rest[i] += (d0 + d1) + (d2 + d3);
            squares[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
        }
    }
    for (; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float d = x[start + i] - centre[i];
            rest[i] += d;
            squares[i] += d * d;
        }
    }
}

VECTORIZED static inline void add_weighted_rows(
    const float *restrict dy, const float *restrict x, int64_t values, int64_t width, const float *restrict centre,
    float *restrict total, float *restrict weighted)
{
    int64_t start = 0;
    for (; start + 4 * width <= values; start += 4 * width) {
        const float *g = dy + start, *v = x + start;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float m = centre[i], g0 = g[i], g1 = g[i + width], g2 = g[i + 2 * width], g3 = g[i + 3 * width];
            float w0 = g0 * (v[i] - m), w1 = g1 * (v[i + width] - m);
            float w2 = g2 * (v[i + 2 * width] - m), w3 = g3 * (v[i + 3 * width] - m);
            total[i] += (g0 + g1) + (g2 + g3);
            weighted[i] += (w0 + w1) + (w2 + w3);
        }
    }
    for (; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            total[i] += dy[start + i];
            weighted[i] += dy[start + i] * (x[start + i] - centre[i]);
        }
    }
}

VECTORIZED static inline void apply_rows(
    const float *x, float *y, int64_t values, int64_t width, const float *k)
{
    const float *scale = k, *mean = k + width, *bias = k + 2 * width;
    for (int64_t start = 0; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            y[start + i] = scale[i] * (x[start + i] - mean[i]) + bias[i];
    }
}

VECTORIZED static inline void gradient_of_rows(
    const float *dy, const float *x, float *dx, int64_t values, int64_t width, const float *k)
{
    const float *a = k, *b = k + width, *mean = k + 2 * width, *c = k + 3 * width;
    for (int64_t start = 0; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            dx[start + i] = a[i] * dy[start + i] + (b[i] * (x[start + i] - mean[i]) + c[i]);
    }
}

static inline void gather(float *row, double *sums, int64_t width)
{
    for (int64_t i = 0; i < width; i++) {
        sums[i] += row[i];
        row[i] = 0;
    }
}

/* All sums are about one centre, the mean of a few rows from everywhere. Where it is far from the mean of all, so are
   those rows, and the variance is large. */
static inline int observe_rows(const float *x, int64_t rows, int64_t channels, Moments *moments)
{
    int64_t width = width_of(channels), values = rows * channels, block = LINES * width;
    int64_t few = rows < SAMPLE ? rows : SAMPLE;
    double *sums = calloc(2 * width, sizeof(double) + 2 * sizeof(float));
    float *rest = (float *)(sums + 2 * width), *squares = rest + width, *centre = squares + width;
    if (!sums)
        return 1;
    for (int64_t i = 0; i < few; i++)
        for (int64_t c = 0; c < channels; c++)
            centre[c] += x[(2 * i + 1) * rows / (2 * few) * channels + c] / (float)few;
    spread(centre, channels, centre, width);
    for (int64_t start = 0; start < values; start += block) {
        int64_t n = values - start < block ? values - start : block;
        add_centred_rows(x + start, n, width, centre, rest, squares);
        gather(rest, sums, 2 * width);
    }
    for (int64_t c = 0; c < channels; c++) {
        double r = folded(sums, c, channels, width), s = folded(sums + width, c, channels, width);
        moments[c] = (Moments){(double)rows, centre[c] + r / rows, s - r * r / rows};
        if (!isfinite(s)) {
            moments[c] = (Moments){0, 0, 0};
            observe_widely(x + c, rows, channels, moments + c);
        }
    }
    free(sums);
    return 0;
}

static inline int sums_of_rows(
    const float *dy, const float *x, int64_t rows, int64_t channels, const float *centre, double *sums)
{
    int64_t width = width_of(channels), values = rows * channels, block = LINES * width;
    double *totals = calloc(2 * width, sizeof(double) + 2 * sizeof(float));
    float *total = (float *)(totals + 2 * width), *weighted = total + width, *row = weighted + width;
    if (!totals)
        return 1;
    spread(centre, channels, row, width);
    for (int64_t start = 0; start < values; start += block) {
        int64_t n = values - start < block ? values - start : block;
        add_weighted_rows(dy + start, x + start, n, width, row, total, weighted);
        gather(total, totals, 2 * width);
    }
    for (int64_t c = 0; c < channels; c++) {
        sums[2 * c] = folded(totals, c, channels, width);
        sums[2 * c + 1] = folded(totals + width, c, channels, width);
    }
    free(totals);
    return 0;
}

/* Channels last: the rows of all groups are cut into stretches, several to a group where threads outnumber groups. */
static inline void stretch(int64_t rows, int64_t parts, int64_t i, int64_t *start, int64_t *count)
{
    int64_t g = i / parts, p = i % parts;
    *start = g * rows + rows * p / parts;
    *count = g * rows + rows * (p + 1) / parts - *start;
}
