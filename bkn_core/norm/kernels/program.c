#include "calls.h"
#include "program.h"

static const double FLOOR = 1e-12; /* under the square roots: a layer with γ = 0 predicts variance 0 */

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

static void relu(const Line *l, float *v)
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

static void relu_reversed(const Line *l, const float *v, float *g)
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

enum { NODES = 81 }; /* of the quadrature, as in `propagate.py` */

static double node(int i)
{
    return (i - 40) / 5.0;
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

static void max_pool(const Line *l, const float *v, float *out, float *g)
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

static double gain(const Line *l)
{
    double value = *(const float *)l->parameters[0];
    return l->x ? 1 / (1 + exp(-value)) : value;
}

static void put(const Line *l, int parameter, int64_t c, float gradient)
{
    float *to = l->gradients[parameter];
    if (to)
        to[c] = l->accumulates >> parameter & 1 ? to[c] + gradient : gradient;
}

static void evaluate(const Line *l, float *v, float *room, int64_t threads)
{
    const float *p0 = l->parameters[0], *p1 = l->parameters[1], *p2 = l->parameters[2], *p3 = l->parameters[3];
    float *mean = v + l->out_mean, *variance = v + l->out_variance;
    const float *am = v + l->a_mean, *av = v + l->a_variance, *bm = v + l->b_mean, *bv = v + l->b_variance;
    if (l->operation == CONVOLUTION)
        bkn_convolution(l, v, room, threads);
    else if (l->operation == PATCHES)
        bkn_patches(l, v, room);
    else if (l->operation == RELU)
        relu(l, v);
    else if (l->operation == MAX_POOL)
        max_pool(l, v, v, NULL);
    else
        for (int64_t c = 0; c < l->channels; c++) {
            int64_t from = l->operation == GATHER ? ((const int64_t *)l->parameters[0])[c] : c;
            double scale, log_scale;
            switch (l->operation) {
            case NORM:
                mean[c] = p1 ? p1[c] : 0;
                variance[c] = p0 ? p0[c] * p0[c] : 1;
                break;
            case MEASURED:
                mean[c] = p0[c];
                variance[c] = p1[c * l->taps];
                break;
            case ADD:
                mean[c] = am[c] + bm[c];
                variance[c] = av[c] + bv[c];
                break;
            case MULTIPLY:
                mean[c] = am[c] * bm[c];
                variance[c] = av[c] * bv[c] + av[c] * bm[c] * bm[c] + bv[c] * am[c] * am[c];
                break;
            case AFFINE:
                mean[c] = (float)(am[c] * l->x + l->y);
                variance[c] = (float)(av[c] * l->x * l->x);
                break;
            case AVERAGE:
                mean[c] = am[c];
                variance[c] = (float)(av[c] * l->x);
                break;
            case GATHER:
                mean[c] = am[from];
                variance[c] = av[from];
                break;
            case REFINE:
                scale = sqrt(av[c] + l->x);
                log_scale = (p1 ? p1[c] : 0) + (double)(p2 ? p2[c] : 0);
                v[l->b_mean + c] = (float)exp(log_scale); /* kept: the innovation moves before the backward pass */
                mean[c] = (float)(am[c] + ((p0 ? p0[c] : 0) + (double)(p3 ? p3[c] : 0)) * scale);
                variance[c] = av[c] * v[l->b_mean + c];
                break;
            case GAIN:
                mean[c] = (float)(gain(l) * *p1);
                break;
            }
        }
}

static void reverse(const Line *l, const float *v, float *g, float *room, int64_t threads)
{
    const float *p0 = l->parameters[0];
    const float *am = v + l->a_mean, *av = v + l->a_variance, *bm = v + l->b_mean, *bv = v + l->b_variance;
    float *gam = g + l->a_mean, *gav = g + l->a_variance, *gbm = g + l->b_mean, *gbv = g + l->b_variance;
    if (l->operation == CONVOLUTION)
        bkn_convolution_reversed(l, v, g, room, threads);
    else if (l->operation == PATCHES)
        bkn_patches_reversed(l, v, g, room);
    else if (l->operation == RELU)
        relu_reversed(l, v, g);
    else if (l->operation == MAX_POOL)
        max_pool(l, v, NULL, g);
    else
        for (int64_t c = 0; c < l->channels; c++) {
            int64_t from = l->operation == GATHER ? ((const int64_t *)l->parameters[0])[c] : c;
            float gm = g[l->out_mean + c], gv = g[l->out_variance + c];
            double scale, factor;
            switch (l->operation) {
            case NORM:
                put(l, 0, c, p0 ? 2 * p0[c] * gv : 0);
                put(l, 1, c, gm);
                break;
            case ADD:
                gam[c] += gm;
                gav[c] += gv;
                gbm[c] += gm;
                gbv[c] += gv;
                break;
            case MULTIPLY:
                gam[c] += gm * bm[c] + 2 * gv * bv[c] * am[c];
                gbm[c] += gm * am[c] + 2 * gv * av[c] * bm[c];
                gav[c] += gv * (bv[c] + bm[c] * bm[c]);
                gbv[c] += gv * (av[c] + am[c] * am[c]);
                break;
            case AFFINE:
                gam[c] += (float)(gm * l->x);
                gav[c] += (float)(gv * l->x * l->x);
                break;
            case AVERAGE:
                gam[c] += gm;
                gav[c] += (float)(gv * l->x);
                break;
            case GATHER:
                gam[from] += gm;
                gav[from] += gv;
                break;
            case REFINE:
                scale = sqrt(av[c] + l->x);
                factor = bm[c];
                put(l, 0, c, (float)(gm * scale));
                put(l, 1, c, (float)(gv * av[c] * factor));
                gam[c] += gm;
                gav[c] += (float)(gv * factor + (p0 ? 0.5 * gm * p0[c] / scale : 0)); /* the innovation is a constant */
                break;
            case GAIN:
                if (!l->gradients[0]) /* a computed one has moved since */
                    break;
                factor = gain(l);
                put(l, 0, c, (float)(gm * *(const float *)l->parameters[1] * (l->x ? factor * (1 - factor) : 1)));
                break;
            }
        }
}

/* Memory for any one line: two messages in columns and their gradients. NULL where there is none. */
static float *make_room(const Program *p)
{
    int64_t most = 1;
    const Line *lines = p->lines;
    for (int64_t i = 0; i < p->count; i++) {
        int64_t columns = lines[i].inputs * lines[i].taps;
        most = columns > most ? columns : most;
    }
    return malloc(4 * most * sizeof(float));
}

int bkn_evaluate(const Program *p)
{
    float *room = make_room(p);
    const Line *lines = p->lines;
    for (int64_t i = 0; room && i < p->count; i++)
        evaluate(lines + i, p->values, room, p->threads);
    free(room);
    return !room;
}

int bkn_reverse(const Program *p)
{
    float *room = make_room(p);
    const Line *lines = p->lines;
    for (int64_t i = p->count - 1; room && i >= 0; i--)
        reverse(lines + i, p->values, p->gradients, room, p->threads);
    free(room);
    return !room;
}
