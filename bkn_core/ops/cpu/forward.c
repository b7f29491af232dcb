/* One layer forward: observe, blend with the prior, apply. The formulas stand in `normalize.py`. */

#include "activation.h"

static void blend(const Forward *f, int64_t g, int64_t c, const Moments *seen)
{
    int64_t at = g * f->channels + c, plane = f->groups * f->channels;
    double m2 = seen->m2 < 0 ? 0 : seen->m2; /* rounding, where all values are equal */
    float mean = (float)seen->mean, variance = (float)(m2 / seen->count), q = f->prior_mean ? *f->gain : 1;
    f->statistics[2 * plane + at] = mean;
    f->statistics[3 * plane + at] = variance;
    float limited = variance > LARGEST ? LARGEST : variance;
    float rest = q > 0 && seen->count > 1 ? q * variance / (float)(seen->count - 1) : 0;
    if (f->prior_mean) {
        float expected = f->prior_mean[g * f->prior_stride + c];
        float predicted = f->prior_variance[g * f->prior_stride + c], d = mean - expected, square = d * d;
        square = square > LARGEST ? LARGEST : square;
        mean = expected + q * d;
        variance = predicted + q * (limited - predicted + (1 - q) * square);
    }
    float inverse = 1 / sqrtf(variance + (float)f->eps);
    float scale = f->weight ? inverse * f->weight[c] : inverse;
    f->statistics[at] = mean;
    f->statistics[plane + at] = variance;
    f->statistics[4 * plane + at] = variance + rest;
    f->statistics[5 * plane + at] = inverse;
    float *k = f->coefficients + 3 * g * f->channels + c;
    k[0] = scale;
    k[f->channels] = mean;
    k[2 * f->channels] = f->bias ? f->bias[c] : 0;
}

/* Channels first: a task is a channel of a group, whose values stay in the cache between the passes. */
static void forward_planes(const void *task, int64_t first, int64_t last)
{
    const Forward *f = task;
    const Passes *p = f->passes;
    int64_t image = f->channels * f->length;
    for (int64_t i = first; i < last; i++) {
        int64_t g = i / f->channels, c = i % f->channels, start = g * f->images * image + c * f->length;
        Moments seen = {0, 0, 0};
        for (int64_t n = 0, at = start; n < f->images; n++, at += image) {
            if (n + 1 < f->images)
                fetch(p, f->x, at + image, f->length);
            p->observe_plane(value_at(p, f->x, at), f->length, &seen);
        }
        blend(f, g, c, &seen);
        const float *all = f->coefficients + 3 * g * f->channels + c;
        float k[3] = {all[0], all[f->channels], all[2 * f->channels]};
        for (int64_t n = 0, at = start; n < f->images; n++, at += image)
            p->apply_plane(value_at(p, f->x, at), value_at(p, f->y, at), f->length, k);
    }
}

static void observe_stretches(const void *task, int64_t first, int64_t last)
{
    const Forward *f = task;
    const Passes *p = f->passes;
    for (int64_t i = first; i < last; i++) {
        int64_t start, count, c = f->channels;
        stretch(f->images * f->length, f->parts, i, &start, &count);
        if (count && p->observe_rows(value_at(p, f->x, start * c), count, c, f->partial + i * c))
            *f->failed = 1;
    }
}

static void blend_group(const Forward *f, int64_t g)
{
    for (int64_t c = 0; c < f->channels; c++) {
        Moments seen = {0, 0, 0};
        for (int64_t p = 0; p < f->parts; p++) {
            const Moments *part = f->partial + (g * f->parts + p) * f->channels + c;
            if (part->count > 0)
                merge(&seen, part->count, part->mean, part->m2);
        }
        blend(f, g, c, &seen);
    }
}

static void apply_stretches(const void *task, int64_t first, int64_t last)
{
    const Forward *f = task;
    const Passes *p = f->passes;
    int64_t width = width_of(f->channels);
    float *rows = malloc(3 * width * sizeof(float));
    if (!rows) {
        *f->failed = 1;
        return;
    }
    for (int64_t i = first; i < last; i++) {
        int64_t start, count, g = i / f->parts;
        stretch(f->images * f->length, f->parts, i, &start, &count);
        for (int j = 0; j < 3; j++)
            spread(f->coefficients + (3 * g + j) * f->channels, f->channels, rows + j * width, width);
        start *= f->channels;
        p->apply_rows(value_at(p, f->x, start), value_at(p, f->y, start), count * f->channels, width, rows);
    }
    free(rows);
}

static void forward_groups(const void *task, int64_t first, int64_t last)
{
    for (int64_t g = first; g < last; g++) {
        observe_stretches(task, g, g + 1);
        blend_group(task, g);
        apply_stretches(task, g, g + 1);
    }
}

int bkn_forward(const Forward *given)
{
    Forward f = *given;
    int64_t plane = f.groups * f.channels;
    f.passes = passes_for(f.type);
    f.threads = threads_for(plane * f.images * f.length, f.threads);
    f.parts = f.groups >= 2 * f.threads ? 1 : f.threads;
    f.coefficients = malloc(3 * plane * sizeof(float));
    f.partial = f.is_channels_last ? calloc(plane * f.parts, sizeof(Moments)) : NULL;
    int failed = !f.coefficients || (f.is_channels_last && !f.partial);
    f.failed = &failed;
    if (!failed && !f.is_channels_last) {
        run(forward_planes, &f, plane, f.threads);
    } else if (!failed && f.parts == 1) {
        run(forward_groups, &f, f.groups, f.threads);
    } else if (!failed) {
        run(observe_stretches, &f, f.groups * f.parts, f.threads);
        for (int64_t g = 0; g < f.groups; g++)
            blend_group(&f, g);
        run(apply_stretches, &f, f.groups * f.parts, f.threads);
    }
    free(f.coefficients), free(f.partial);
    return failed;
}

