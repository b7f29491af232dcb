/* The passes over the values of an activation, float32, in two layouts: planes (channels first: all positions of one
   channel lie together) and rows (channels last: all channels of one position lie together).

   Statistics are summed in blocks that fit the cache, each about its own mean, and blocks are merged in float64 by the
   update of Chan, Golub and LeVeque. */

#pragma once

#include "parallel.h"

enum { BLOCK = 8192, ROW = 256 };
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
    return channels >= ROW ? channels : ROW / channels * channels;
}

static inline void spread(const float *values, int64_t channels, float *row, int64_t width)
{
    for (int64_t i = 0; i < width; i++)
        row[i] = i < channels ? values[i] : row[i - channels];
}

/* Sums over rows keep some columns in registers while they go down the rows; what is left over is added one by one. */
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
enum { LANES = 8, HELD = 4 * LANES };
#define EACH for (int j = 0; j < 4; j++)

VECTORIZED static inline void add_rows(const float *x, int64_t values, int64_t width, float *sum)
{
    for (int64_t start = 0; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            sum[i] += x[start + i];
    }
}

VECTORIZED static inline void add_centred_rows(
    const float *x, int64_t values, int64_t width, const float *mean, float *rest, float *squares)
{
    int64_t whole = values / width * width, i = 0;
    for (; i + HELD <= width; i += HELD) {
        const Lanes *centre = (const Lanes *)(mean + i);
        Lanes m[4], r[4], s[4];
        EACH m[j] = centre[j], r[j] = s[j] = (Lanes){0};
        for (int64_t at = i; at < whole; at += width) {
            const Lanes *v = (const Lanes *)(x + at);
            EACH {
                Lanes d = v[j] - m[j];
                r[j] += d;
                s[j] += d * d;
            }
        }
        EACH ((Lanes *)(rest + i))[j] += r[j], ((Lanes *)(squares + i))[j] += s[j];
    }
    for (int64_t start = 0; start < values; start += width)
        for (int64_t k = start < whole ? i : 0; k < width && start + k < values; k++) {
            float d = x[start + k] - mean[k];
            rest[k] += d;
            squares[k] += d * d;
        }
}

VECTORIZED static inline void add_weighted_rows(
    const float *dy, const float *x, int64_t values, int64_t width, const float *centre, float *total, float *weighted)
{
    int64_t whole = values / width * width, i = 0;
    for (; i + HELD <= width; i += HELD) {
        const Lanes *mean = (const Lanes *)(centre + i);
        Lanes m[4], t[4], w[4];
        EACH m[j] = mean[j], t[j] = w[j] = (Lanes){0};
        for (int64_t at = i; at < whole; at += width) {
            const Lanes *g = (const Lanes *)(dy + at), *v = (const Lanes *)(x + at);
            EACH {
                t[j] += g[j];
                w[j] += g[j] * (v[j] - m[j]);
            }
        }
        EACH ((Lanes *)(total + i))[j] += t[j], ((Lanes *)(weighted + i))[j] += w[j];
    }
    for (int64_t start = 0; start < values; start += width)
        for (int64_t k = start < whole ? i : 0; k < width && start + k < values; k++) {
            total[k] += dy[start + k];
            weighted[k] += dy[start + k] * (x[start + k] - centre[k]);
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

/* Rows of a block: as many values as fit the cache, and enough of a channel for its own small arithmetic not to matter. */
static inline int64_t rows_of_block(int64_t channels, int64_t width)
{
    int64_t lines = width / channels, some = BLOCK / width * lines, enough = 8 * BLOCK / channels;
    enough = enough < 128 ? enough : 128;
    int64_t rows = some > enough ? some : enough / lines * lines;
    return rows > lines ? rows : lines;
}

static inline double folded(const float *row, int64_t channel, int64_t channels, int64_t width)
{
    double sum = 0;
    for (int64_t i = channel; i < width; i += channels)
        sum += row[i];
    return sum;
}

static inline void observe_rows(const float *x, int64_t rows, int64_t channels, Moments *moments)
{
    int64_t width = width_of(channels), block = rows_of_block(channels, width);
    float *work = malloc(4 * width * sizeof(float)), *sum = work, *mean = work + width;
    float *rest = work + 2 * width, *squares = work + 3 * width;
    for (int64_t start = 0; start < rows; start += block) {
        int64_t n = rows - start < block ? rows - start : block;
        const float *v = x + start * channels;
        for (int64_t i = 0; i < width; i++)
            sum[i] = rest[i] = squares[i] = 0;
        add_rows(v, n * channels, width, sum);
        for (int64_t c = 0; c < channels; c++)
            mean[c] = (float)(folded(sum, c, channels, width) / n);
        spread(mean, channels, mean, width);
        add_centred_rows(v, n * channels, width, mean, rest, squares);
        for (int64_t c = 0; c < channels; c++) {
            double r = folded(rest, c, channels, width), s = folded(squares, c, channels, width);
            merge(moments + c, (double)n, mean[c] + r / n, s - r * r / n);
        }
    }
    free(work);
}

static inline void sums_of_rows(
    const float *dy, const float *x, int64_t rows, int64_t channels, const float *centre, double *sums)
{
    int64_t width = width_of(channels), block = rows_of_block(channels, width);
    float *work = malloc(3 * width * sizeof(float)), *row = work, *total = work + width, *weighted = work + 2 * width;
    spread(centre, channels, row, width);
    for (int64_t start = 0; start < rows; start += block) {
        int64_t n = rows - start < block ? rows - start : block, at = start * channels;
        for (int64_t i = 0; i < width; i++)
            total[i] = weighted[i] = 0;
        add_weighted_rows(dy + at, x + at, n * channels, width, row, total, weighted);
        for (int64_t c = 0; c < channels; c++) {
            sums[2 * c] += folded(total, c, channels, width);
            sums[2 * c + 1] += folded(weighted, c, channels, width);
        }
    }
    free(work);
}

/* Channels last: the rows of all groups are cut into stretches, several to a group where threads outnumber groups. */
static inline void stretch(int64_t rows, int64_t parts, int64_t i, int64_t *start, int64_t *count)
{
    int64_t g = i / parts, p = i % parts;
    *start = g * rows + rows * p / parts;
    *count = g * rows + rows * (p + 1) / parts - *start;
}
