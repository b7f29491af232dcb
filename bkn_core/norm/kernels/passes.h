/* The passes over the values of an activation, float32, in two layouts: planes (channels first: all positions of one
   channel lie together) and rows (channels last: all channels of one position lie together).

   Statistics are summed in blocks, each about a mean of its own or its neighbour's, and blocks are merged in float64 (of
   planes by the update of Chan, Golub and LeVeque). */

#pragma once

#include "parallel.h"

enum { BLOCK = 8192, ROW = 256, LINES = 512, SAMPLE = 16 };
static const float LARGEST = 1e30f; /* squares stay below, so that 0 * infinity makes no NaN */

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
        merge(moments, (double)n, mean + (double)rest / n, squares - (double)rest * rest / n);
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

/* Columns from `first` to `last`: move the sums of `lines` values of a block about its centre m into the sums about o,
   and the centre onto the block's mean, where the next block's sums are taken. Clears them for it. */
VECTORIZED static inline void gather_rows(
    int64_t first, int64_t last, int64_t lines, const double *restrict o, float *restrict m, float *restrict rest,
    float *restrict squares, double *restrict sum, double *restrict m2)
{
    double n = (double)lines;
    float share = 1 / (float)lines;
#pragma omp simd
    for (int64_t i = first; i < last; i++) {
        double shift = m[i] - o[i], r = rest[i];
        sum[i] += r + n * shift;
        m2[i] += squares[i] + shift * (2 * r + n * shift);
        m[i] += rest[i] * share;
        rest[i] = squares[i] = 0;
    }
}

/* Each block is summed about the mean of the one before it, the first about the mean of its first rows. That is as good
   as about its own mean: where the two differ much, the variance of both together is as large. */
static inline int observe_rows(const float *x, int64_t rows, int64_t channels, Moments *moments)
{
    int64_t width = width_of(channels), values = rows * channels, block = LINES * width;
    int64_t few = (rows < SAMPLE ? rows : SAMPLE) * channels;
    double *origin = calloc(3 * width, sizeof(double) + sizeof(float)), *sum = origin + width, *m2 = sum + width;
    float *centre = (float *)(m2 + width), *rest = centre + width, *squares = rest + width;
    if (!origin)
        return 1;
    for (int64_t i = 0; i < few; i++)
        sum[i % channels] += x[i];
    for (int64_t i = 0; i < width; i++) {
        centre[i] = (float)(sum[i % channels] * channels / few);
        origin[i] = centre[i];
    }
    for (int64_t i = 0; i < channels; i++)
        sum[i] = 0;
    for (int64_t start = 0; start < values; start += block) {
        int64_t n = values - start < block ? values - start : block, lines = n / width, left = n % width;
        add_centred_rows(x + start, n, width, centre, rest, squares);
        gather_rows(0, left, lines + 1, origin, centre, rest, squares, sum, m2);
        if (lines)
            gather_rows(left, width, lines, origin, centre, rest, squares, sum, m2);
    }
    for (int64_t c = 0; c < channels; c++) {
        double r = folded(sum, c, channels, width), s = folded(m2, c, channels, width);
        moments[c] = (Moments){(double)rows, origin[c] + r / rows, s - r * r / rows};
    }
    free(origin);
    return 0;
}

static inline int sums_of_rows(
    const float *dy, const float *x, int64_t rows, int64_t channels, const float *centre, double *sums)
{
    int64_t width = width_of(channels), values = rows * channels, block = LINES * width;
    double *totals = calloc(2 * width, sizeof(double) + 2 * sizeof(float));
    float *total = (float *)(totals + 2 * width), *row = total + 2 * width;
    if (!totals)
        return 1;
    spread(centre, channels, row, width);
    for (int64_t start = 0; start < values; start += block) {
        int64_t n = values - start < block ? values - start : block;
        add_weighted_rows(dy + start, x + start, n, width, row, total, total + width);
        for (int64_t i = 0; i < 2 * width; i++) {
            totals[i] += total[i];
            total[i] = 0;
        }
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
