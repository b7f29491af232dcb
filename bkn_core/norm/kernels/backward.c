/* One layer backward: two sums, the small arithmetic of each channel, one affine pass. The formulas stand in `fused.py`. */

#include "passes.h"

typedef struct {
    int64_t groups, images, channels, length, is_channels_last, threads;
    const float *dy, *x, *prior_mean, *prior_variance;
    int64_t prior_stride;
    const float *gain, *weight, *statistics, *to_statistics; /* gradient of the statistics or NULL */
    float *dx, *to_affine;                                   /* (2, C): dγ, dβ */
    float *to_prior_mean, *to_prior_variance;                /* (C,) or (G, C) */
    float *to_gain;
    /* of this call, not set by the caller: */
    int64_t parts;
    double *sums;        /* (G, parts, C, 2) */
    float *coefficients; /* (G, 4, C): dx = k0 dy + (k1 (x - k2) + k3) */
    double *small;       /* (5, G, C): dγ, dβ, µ', v', q */
} Backward;

static void differentiate(const Backward *b, int64_t g, int64_t c, const double *sums)
{
    int64_t at = g * b->channels + c, plane = b->groups * b->channels;
    const float *s = b->statistics;
    double inverse = s[5 * plane + at], scale = b->weight ? inverse * b->weight[c] : inverse;
    double gm = -scale * sums[0], gv = -0.5 * scale * inverse * inverse * sums[1], seen = s[2 * plane + at];
    double count = (double)(b->images * b->length);
    b->small[at] = inverse * sums[1];
    b->small[plane + at] = sums[0];
    if (b->to_statistics) {
        gm += b->to_statistics[at];
        gv += b->to_statistics[plane + at];
    }
    double to_mean = gm, to_variance = gv;
    if (b->prior_mean) {
        double q = *b->gain, p = 1 - q, predicted = b->prior_variance[g * b->prior_stride + c];
        double d = seen - b->prior_mean[g * b->prior_stride + c], cross = 2 * p * q * gv * d;
        double variance = s[3 * plane + at], square = d * d;
        square = square > LARGEST ? LARGEST : square;
        variance = variance > LARGEST ? LARGEST : variance;
        b->small[2 * plane + at] = p * gm - cross;
        b->small[3 * plane + at] = p * gv;
        b->small[4 * plane + at] = gm * d + gv * (variance - predicted + (p - q) * square);
        to_mean = q * gm + cross;
        to_variance = q * gv;
    }
    float *k = b->coefficients + 4 * g * b->channels + c;
    k[0] = (float)scale;
    k[b->channels] = (float)(2 * to_variance / count);
    k[2 * b->channels] = (float)seen;
    k[3 * b->channels] = (float)(to_mean / count);
}

static void backward_planes(const void *task, int64_t first, int64_t last)
{
    const Backward *b = task;
    int64_t image = b->channels * b->length;
    for (int64_t i = first; i < last; i++) {
        int64_t g = i / b->channels, c = i % b->channels, start = g * b->images * image + c * b->length;
        double sums[2] = {0, 0};
        for (int64_t n = 0; n < b->images; n++)
            sums_of_plane(b->dy + start + n * image, b->x + start + n * image, b->length, b->statistics[i], sums);
        differentiate(b, g, c, sums);
        const float *all = b->coefficients + 4 * g * b->channels + c;
        float k[4] = {all[0], all[b->channels], all[2 * b->channels], all[3 * b->channels]};
        for (int64_t n = 0; n < b->images; n++) {
            int64_t at = start + n * image;
            gradient_of_plane(b->dy + at, b->x + at, b->dx + at, b->length, k);
        }
    }
}

static void sum_stretches(const void *task, int64_t first, int64_t last)
{
    const Backward *b = task;
    for (int64_t i = first; i < last; i++) {
        int64_t start, count, c = b->channels;
        stretch(b->images * b->length, b->parts, i, &start, &count);
        sums_of_rows(b->dy + start * c, b->x + start * c, count, c, b->statistics + i / b->parts * c, b->sums + 2 * i * c);
    }
}

static void differentiate_group(const Backward *b, int64_t g)
{
    for (int64_t c = 0; c < b->channels; c++) {
        double sums[2] = {0, 0};
        for (int64_t p = 0; p < b->parts; p++)
            for (int j = 0; j < 2; j++)
                sums[j] += b->sums[2 * ((g * b->parts + p) * b->channels + c) + j];
        differentiate(b, g, c, sums);
    }
}

static void gradient_of_stretches(const void *task, int64_t first, int64_t last)
{
    const Backward *b = task;
    int64_t width = width_of(b->channels);
    float *rows = malloc(4 * width * sizeof(float));
    for (int64_t i = first; i < last; i++) {
        int64_t start, count, g = i / b->parts;
        stretch(b->images * b->length, b->parts, i, &start, &count);
        for (int j = 0; j < 4; j++)
            spread(b->coefficients + (4 * g + j) * b->channels, b->channels, rows + j * width, width);
        start *= b->channels;
        gradient_of_rows(b->dy + start, b->x + start, b->dx + start, count * b->channels, width, rows);
    }
    free(rows);
}

static void backward_groups(const void *task, int64_t first, int64_t last)
{
    for (int64_t g = first; g < last; g++) {
        sum_stretches(task, g, g + 1);
        differentiate_group(task, g);
        gradient_of_stretches(task, g, g + 1);
    }
}

static void reduce(const Backward *b)
{
    int64_t plane = b->groups * b->channels;
    double to_gain = 0;
    for (int64_t c = 0; c < b->channels; c++) {
        double sums[4] = {0, 0, 0, 0};
        for (int64_t g = 0; g < b->groups; g++) {
            int64_t at = g * b->channels + c;
            for (int j = 0; j < (b->prior_mean ? 4 : 2); j++)
                sums[j] += b->small[j * plane + at];
            if (b->prior_mean) {
                double part = b->small[4 * plane + at]; /* infinities of both signs must not meet in the sum */
                to_gain += part > LARGEST ? LARGEST : part < -LARGEST ? -LARGEST : part;
                if (b->prior_stride) {
                    b->to_prior_mean[at] = (float)b->small[2 * plane + at];
                    b->to_prior_variance[at] = (float)b->small[3 * plane + at];
                }
            }
        }
        b->to_affine[c] = (float)sums[0];
        b->to_affine[b->channels + c] = (float)sums[1];
        if (b->prior_mean && !b->prior_stride) {
            b->to_prior_mean[c] = (float)sums[2];
            b->to_prior_variance[c] = (float)sums[3];
        }
    }
    if (b->prior_mean)
        *b->to_gain = (float)to_gain;
}

int bkn_backward(const Backward *given)
{
    Backward b = *given;
    int64_t plane = b.groups * b.channels;
    b.threads = threads_for(plane * b.images * b.length, b.threads);
    b.parts = b.groups >= 2 * b.threads ? 1 : b.threads;
    b.sums = b.is_channels_last ? calloc(2 * plane * b.parts, sizeof(double)) : NULL;
    b.coefficients = malloc(4 * plane * sizeof(float));
    b.small = malloc(5 * plane * sizeof(double));
    int failed = !b.coefficients || !b.small || (b.is_channels_last && !b.sums);
    if (!failed) {
        if (!b.is_channels_last) {
            run(backward_planes, &b, plane, b.threads);
        } else if (b.parts == 1) {
            run(backward_groups, &b, b.groups, b.threads);
        } else {
            run(sum_stretches, &b, b.groups * b.parts, b.threads);
            for (int64_t g = 0; g < b.groups; g++)
                differentiate_group(&b, g);
            run(gradient_of_stretches, &b, b.groups * b.parts, b.threads);
        }
        reduce(&b);
    }
    free(b.sums), free(b.coefficients), free(b.small);
    return failed;
}
