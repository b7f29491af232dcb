/* One layer backward: two sums, the small arithmetic of each channel, one affine pass. The formulas stand in `normalize.py`. */

#include "activation.h"

enum { COST = 16 }; /* of the small arithmetic of a channel in a group, in values of an activation */

static const double LARGEST_GRADIENT = 1e30; /* of the gain by one channel of one group: their sum stays finite */
static const double LARGEST_RATIO = 3, USUAL = 30, FEW = 32, MANY = 128; /* as in `inflation_gradient.py` */

static double limited(double value, double limit)
{
    return value > limit ? limit : value < -limit ? -limit : value;
}

static float *coefficient(const Backward *b, int64_t g, int j, int64_t c)
{
    return b->coefficients + (4 * g + j) * b->channels + c;
}

typedef struct {
    double weight, bias, prior_mean, prior_variance, gain; /* gradients */
    double sensitivity, spread, predicted;                 /* Σ v' gv', Σ S + d², Σ v' */
} Totals;

/* One channel of one group. */
static void differentiate_group(const Backward *b, int64_t g, int64_t c, Totals *totals)
{
    int64_t at = g * b->channels + c, plane = b->groups * b->channels;
    const float *s = b->statistics;
    double sums[2] = {0, 0}, count = (double)(b->images * b->length);
    for (int64_t p = 0; p < b->parts; p++)
        for (int j = 0; j < 2; j++)
            sums[j] += b->sums[2 * ((g * b->parts + p) * b->channels + c) + j];
    double inverse = s[5 * plane + at], scale = b->weight ? inverse * b->weight[c] : inverse;
    double gm = -scale * sums[0], gv = -0.5 * scale * inverse * inverse * sums[1], seen = s[2 * plane + at];
    totals->weight += inverse * sums[1];
    totals->bias += sums[0];
    if (b->to_statistics) {
        gm += b->to_statistics[at];
        gv += b->to_statistics[plane + at];
    }
    double to_mean = gm, to_variance = gv;
    if (b->prior_mean) {
        double q = *b->gain, p = 1 - q, predicted = b->prior_variance[g * b->prior_stride + c];
        double d = seen - b->prior_mean[g * b->prior_stride + c], cross = 2 * p * q * gv * d;
        double variance = limited(s[3 * plane + at], LARGEST), square = limited(d * d, LARGEST);
        totals->prior_mean += p * gm - cross;
        totals->prior_variance += p * gv;
        totals->gain += limited(gm * d + gv * (variance - predicted + (p - q) * square), LARGEST_GRADIENT);
        totals->sensitivity += p * gv * predicted;
        totals->spread += variance + square;
        totals->predicted += predicted;
        to_mean = q * gm + cross;
        to_variance = q * gv;
        if (b->prior_stride) {
            b->to_prior_mean[at] = (float)(p * gm - cross);
            b->to_prior_variance[at] = (float)(p * gv);
        }
    }
    *coefficient(b, g, 0, c) = (float)scale;
    *coefficient(b, g, 1, c) = (float)(2 * to_variance / count);
    *coefficient(b, g, 2, c) = (float)seen;
    *coefficient(b, g, 3, c) = (float)(to_mean / count);
}

/* Add what this pass saw to what the layer's passes have gathered. */
static void remember(const Backward *b, int64_t c, double variance, double mean)
{
    if (!isfinite((float)variance) || !isfinite((float)mean))
        return;
    b->gathered[c] += (float)variance;
    b->gathered[b->channels + c] += (float)mean;
    b->gathered[2 * b->channels + c] += 1;
}

/* The part of what is beyond the usual that a pass of so many images follows. */
static double own_part(double images)
{
    double part = (images - FEW) / (MANY - FEW);
    return part > 1 ? 1 : part > 0 ? part : 0;
}

/* By how much the sensitivity of the variance (0) or of the mean (1) may differ from its running mean. */
static double usual(const Backward *b, int i)
{
    const float *running = b->sensitivity + i * b->channels;
    double squares = 0;
    for (int64_t c = 0; c < b->channels; c++)
        squares += (double)running[c] * running[c];
    return USUAL * sqrt(squares / (double)b->channels);
}

/* The sensitivity of the passes before, and of this one's what is beyond the usual. */
static double used(const Backward *b, int64_t c, int i, double seen)
{
    double running = b->sensitivity[i * b->channels + c], surplus = seen - running;
    if (!(b->usual[i] > 0) || !isfinite((float)seen))
        return running;
    return running + b->own_part * (surplus - limited(surplus, b->usual[i]));
}

/* What a group shows of a channel: how far its mean is from the prior's, and its spread. */
static double shown(const Backward *b, int64_t g, int64_t c, double *apart)
{
    *apart = *coefficient(b, g, 2, c) - (double)b->prior_mean[g * b->prior_stride + c];
    return limited(b->statistics[(3 * b->groups + g) * b->channels + c], LARGEST) + limited(*apart * *apart, LARGEST);
}

/* What the gradient of the inflations adds to every group. */
static void follow(const Backward *b, int64_t c, Totals *totals)
{
    double groups = (double)b->groups, count = (double)(b->images * b->length), apart, pull = b->eps;
    double spread = totals->spread / groups + b->eps, predicted = totals->predicted / groups + b->eps;
    double largest = LARGEST_RATIO * predicted, square = spread / LARGEST_RATIO;
    double deviation = sqrt(predicted > square ? predicted : square);
    double seen[2] = {totals->sensitivity, totals->prior_mean * deviation};
    remember(b, c, seen[0], seen[1]);
    for (int64_t g = 0; g < b->groups; g++)
        pull += limited(shown(b, g, c, &apart), largest) / groups;
    double share = used(b, c, 0, seen[0]) / groups / predicted, push = used(b, c, 1, seen[1]) / groups / deviation;
    double to_variance = share * pull / predicted;
    for (int64_t g = 0; g < b->groups; g++) {
        double own = shown(b, g, c, &apart), part = own > largest ? share * largest / own : share;
        double shift = push + 2 * part * apart;
        *coefficient(b, g, 1, c) += (float)(2 * part / count);
        *coefficient(b, g, 3, c) += (float)(shift / count);
        totals->prior_mean -= shift;
        totals->prior_variance -= to_variance;
        if (b->prior_stride) {
            b->to_prior_mean[g * b->channels + c] -= (float)shift;
            b->to_prior_variance[g * b->channels + c] -= (float)to_variance;
        }
    }
}

static void differentiate(const Backward *b, int64_t c)
{
    Totals totals = {0};
    for (int64_t g = 0; g < b->groups; g++)
        differentiate_group(b, g, c, &totals);
    if (b->prior_mean && b->gathered)
        follow(b, c, &totals);
    if (b->to_weight)
        b->to_weight[c] = (float)totals.weight;
    b->to_bias[c] = (float)totals.bias;
    b->gain_parts[c] = totals.gain;
    if (b->prior_mean && !b->prior_stride) {
        b->to_prior_mean[c] = (float)totals.prior_mean;
        b->to_prior_variance[c] = (float)totals.prior_variance;
    }
}

static void differentiate_channels(const void *task, int64_t first, int64_t last)
{
    for (int64_t c = first; c < last; c++)
        differentiate(task, c);
}

/* Channels first: a task is a channel, whose values stay in the cache between the passes. */
static void backward_planes(const void *task, int64_t first, int64_t last)
{
    const Backward *b = task;
    const Passes *p = b->passes;
    int64_t image = b->channels * b->length, images = b->groups * b->images;
    for (int64_t c = first; c < last; c++) {
        for (int64_t n = 0; n < images; n++) {
            int64_t at = n * image + c * b->length, i = n / b->images * b->channels + c;
            const void *dy = value_at(p, b->dy, at), *x = value_at(p, b->x, at);
            if (n + 1 < images)
                fetch(p, b->dy, at + image, b->length), fetch(p, b->x, at + image, b->length);
            p->sums_of_plane(dy, x, b->length, b->statistics[i], b->sums + 2 * i);
        }
        differentiate(b, c);
        for (int64_t n = 0; n < images; n++) {
            int64_t at = n * image + c * b->length, g = n / b->images;
            float k[4];
            for (int j = 0; j < 4; j++)
                k[j] = *coefficient(b, g, j, c);
            p->gradient_of_plane(value_at(p, b->dy, at), value_at(p, b->x, at), value_at(p, b->dx, at), b->length, k);
        }
    }
}

static void sum_stretches(const void *task, int64_t first, int64_t last)
{
    const Backward *b = task;
    const Passes *p = b->passes;
    for (int64_t i = first; i < last; i++) {
        int64_t start, count, c = b->channels;
        stretch(b->images * b->length, b->parts, i, &start, &count);
        const float *centre = b->statistics + i / b->parts * c;
        const void *dy = value_at(p, b->dy, start * c), *x = value_at(p, b->x, start * c);
        if (p->sums_of_rows(dy, x, count, c, centre, b->sums + 2 * i * c))
            *b->failed = 1;
    }
}

static void gradient_of_stretches(const void *task, int64_t first, int64_t last)
{
    const Backward *b = task;
    const Passes *p = b->passes;
    int64_t width = width_of(b->channels);
    float *rows = malloc(4 * width * sizeof(float));
    if (!rows) {
        *b->failed = 1;
        return;
    }
    for (int64_t i = first; i < last; i++) {
        int64_t start, count, g = i / b->parts;
        stretch(b->images * b->length, b->parts, i, &start, &count);
        for (int j = 0; j < 4; j++)
            spread(coefficient(b, g, j, 0), b->channels, rows + j * width, width);
        start *= b->channels;
        const void *dy = value_at(p, b->dy, start), *x = value_at(p, b->x, start);
        p->gradient_of_rows(dy, x, value_at(p, b->dx, start), count * b->channels, width, rows);
    }
    free(rows);
}

int bkn_backward(const Backward *given)
{
    Backward b = *given;
    int64_t plane = b.groups * b.channels;
    b.passes = passes_for(b.type);
    b.threads = threads_for(plane * b.images * b.length, b.threads);
    b.parts = b.is_channels_last && b.groups < 2 * b.threads ? b.threads : 1;
    b.sums = calloc(2 * plane * b.parts, sizeof(double));
    b.coefficients = malloc(4 * plane * sizeof(float));
    b.gain_parts = malloc(b.channels * sizeof(double));
    int failed = !b.sums || !b.coefficients || !b.gain_parts;
    b.failed = &failed;
    b.own_part = own_part((double)(b.groups * b.images));
    for (int i = 0; b.gathered && b.own_part > 0 && i < 2; i++)
        b.usual[i] = usual(&b, i);
    if (!failed && b.is_channels_last) {
        run(sum_stretches, &b, b.groups * b.parts, b.threads);
        run(differentiate_channels, &b, b.channels, threads_for(COST * plane * b.parts, b.threads));
        run(gradient_of_stretches, &b, b.groups * b.parts, b.threads);
    } else if (!failed) {
        run(backward_planes, &b, b.channels, b.threads);
    }
    if (!failed && b.prior_mean) {
        double total = 0;
        for (int64_t c = 0; c < b.channels; c++)
            total += b.gain_parts[c];
        *b.to_gain = (float)total;
    }
    free(b.sums), free(b.coefficients), free(b.gain_parts);
    return failed;
}
