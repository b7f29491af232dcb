/* Functions of each value by itself: rectifiers in closed form, and the largest of several. */

#include "pointwise.h"

typedef struct {
    double deviation, cdf, below, pdf;
} Standard; /* Φ(a), Φ(-a) and φ(a) at a = m / √v */

static Standard standard(double mean, double variance)
{
    Standard s;
    s.deviation = sqrt(variance > FLOOR ? variance : FLOOR);
    double a = mean / s.deviation;
    s.cdf = 0.5 * erfc(-a * M_SQRT1_2);
    s.below = 0.5 * erfc(a * M_SQRT1_2);
    s.pdf = exp(-0.5 * a * a) * 0.3989422804014327;
    return s;
}

static void relu(const Instruction *l, float *v)
{
    for (int64_t c = 0; c < l->channels; c++) {
        double mean = v[l->a_mean + c];
        Standard s = standard(mean, v[l->a_variance + c]);
        double a = mean / s.deviation, above = s.pdf + a * s.cdf, under = s.pdf - a * s.below;
        double variance = s.deviation * s.deviation * (s.cdf - above * under);
        v[l->out_mean + c] = (float)(s.deviation * above);
        v[l->out_variance + c] = (float)(variance > 0 ? variance : 0);
    }
}

static void relu_reversed(const Instruction *l, const float *v, float *g)
{
    for (int64_t c = 0; c < l->channels; c++) {
        double mean = v[l->a_mean + c], gm = g[l->out_mean + c], gv = g[l->out_variance + c];
        Standard s = standard(mean, v[l->a_variance + c]);
        double above = s.pdf + mean / s.deviation * s.cdf;
        g[l->a_mean + c] += (float)(gm * s.cdf + 2 * gv * s.deviation * above * s.below);
        if (v[l->a_variance + c] >= FLOOR)
            g[l->a_variance + c] += (float)(gv * (s.cdf - above * s.pdf) + 0.5 * gm * s.pdf / s.deviation);
    }
}

/* The distribution of the largest of `count` values: the power of the cumulated mass, taken apart again. */
static void largest(double count, double *mass)
{
    double total = 0, sum = 0, before = 0;
    for (int i = 0; i < NODES; i++)
        total += exp(-0.5 * node(i) * node(i));
    for (int i = 0; i < NODES; i++) {
        sum += exp(-0.5 * node(i) * node(i)) / total;
        double power = pow(sum < 1 ? sum : 1, count);
        mass[i] = power - before;
        before = power;
    }
}

static void max_pool(const Instruction *l, const float *v, float *out, float *g)
{
    double mass[NODES];
    largest(l->x, mass);
    for (int64_t c = 0; c < l->channels; c++) {
        double m = v[l->a_mean + c], variance = v[l->a_variance + c], mean = 0, square = 0;
        double d = sqrt(variance > FLOOR ? variance : FLOOR), to_mean = 0, to_deviation = 0;
        for (int i = 0; i < NODES; i++)
            mean += mass[i] * (l->y && m + d * node(i) < 0 ? 0 : m + d * node(i));
        for (int i = 0; i < NODES; i++) {
            double z = m + d * node(i), is_live = !(l->y && z <= 0), apart = is_live * z - mean; /* no slope at 0 */
            square += mass[i] * apart * apart;
            if (g) {
                double slope = mass[i] * is_live * (g[l->out_mean + c] + 2 * g[l->out_variance + c] * apart);
                to_mean += slope;
                to_deviation += slope * node(i);
            }
        }
        if (out) {
            out[l->out_mean + c] = (float)mean;
            out[l->out_variance + c] = (float)square;
        } else {
            g[l->a_mean + c] += (float)to_mean;
            if (variance >= FLOOR)
                g[l->a_variance + c] += (float)(0.5 * to_deviation / d);
        }
    }
}

/* By the probability inside the bounds, and what of the normal density they cut off. */
static void clipped(const Instruction *l, float *v)
{
    for (int64_t c = 0; c < l->channels; c++) {
        double mean = v[l->a_mean + c], variance = v[l->a_variance + c];
        Standard a = standard(mean - l->x, variance), b = standard(mean - l->y, variance);
        double d = a.deviation, lower = l->x - mean, upper = l->y - mean;
        double inside = lower > 0 ? a.cdf - b.cdf : b.below - a.below, edge = a.pdf - b.pdf;
        double first = lower * a.below + upper * b.cdf + d * edge;
        double moment = d * (inside + (lower * a.pdf - upper * b.pdf) / d);
        double second = lower * lower * a.below + upper * upper * b.cdf + d * moment;
        double square = second - first * first;
        Moments m = {mean + first, square > 0 ? square : 0, inside, edge, 2 * (d * edge - first * inside),
                     2 * (moment - first * edge)};
        keep(l, v, c, m);
    }
}

static double slope_of(const Instruction *l, int64_t c)
{
    return l->parameters[0] ? ((const float *)l->parameters[0])[c * l->taps] : l->x;
}

static void leaky(const Instruction *l, float *v)
{
    for (int64_t c = 0; c < l->channels; c++) {
        double mean = v[l->a_mean + c], slope = slope_of(l, c), rest = 1 - slope;
        Standard s = standard(mean, v[l->a_variance + c]);
        double d = s.deviation, a = mean / d, above = s.pdf + a * s.cdf, under = s.pdf - a * s.below;
        double positive = d * above, rectified = d * d * (s.cdf - above * under), expected = slope * mean + rest * positive;
        double square = slope * slope * d * d + rest * rest * (rectified > 0 ? rectified : 0) + 2 * slope * rest * d * d * s.cdf;
        double inner = positive + slope * slope * (mean - positive); /* E f f' */
        double level = slope + rest * s.cdf, edge = rest * s.pdf;
        Moments m = {expected, square, level, edge, 2 * (inner - expected * level),
                     2 * (d * (s.cdf + slope * slope * s.below) - expected * edge)};
        keep(l, v, c, m);
    }
}

/* By the slope: the mean of min(X, 0) and its covariance with f. */
static void to_slope(const Instruction *l, const float *v, const float *g)
{
    float *to = l->gradients[0], total = 0;
    for (int64_t c = 0; to && c < l->channels; c++) {
        double mean = v[l->a_mean + c], slope = slope_of(l, c);
        Standard s = standard(mean, v[l->a_variance + c]);
        double d = s.deviation, a = mean / d, negative = d * (a * s.below - s.pdf);
        double square = d * d * (s.below * (1 + a * a) - a * s.pdf), expected = v[l->out_mean + c];
        double part = g[l->out_mean + c] * negative + 2 * g[l->out_variance + c] * (slope * square - expected * negative);
        if (l->taps)
            to[c] = (float)(part + (l->accumulates & 1 ? to[c] : 0));
        total += (float)part;
    }
    if (to && !l->taps)
        to[0] = total + (l->accumulates & 1 ? to[0] : 0);
}

static void kept_reversed(const Instruction *l, const float *v, float *g)
{
    const float *k = v + l->b_mean;
    for (int64_t c = 0; c < l->channels; c++, k += KEPT) {
        float gm = g[l->out_mean + c], gv = g[l->out_variance + c];
        g[l->a_mean + c] += gm * k[0] + gv * k[1];
        g[l->a_variance + c] += gm * k[2] + gv * k[3];
    }
}

void bkn_pointwise(const Instruction *op, float *values)
{
    if (op->operation == RELU)
        relu(op, values);
    else if (op->operation == MAX_POOL)
        max_pool(op, values, values, NULL);
    else if (op->operation == CLIPPED)
        clipped(op, values);
    else
        leaky(op, values);
}

void bkn_pointwise_reversed(const Instruction *op, const float *values, float *gradients)
{
    if (op->operation == RELU)
        relu_reversed(op, values, gradients);
    else if (op->operation == MAX_POOL)
        max_pool(op, values, NULL, gradients);
    else
        kept_reversed(op, values, gradients);
    if (op->operation == LEAKY)
        to_slope(op, values, gradients);
}
