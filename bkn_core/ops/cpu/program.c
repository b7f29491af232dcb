#include "calls.h"
#include "program.h"

static double gain(const Instruction *l)
{
    double value = *(const float *)l->parameters[0];
    return l->x ? 1 / (1 + exp(-value)) : value;
}

static void put(const Instruction *l, int parameter, int64_t c, float gradient)
{
    float *to = l->gradients[parameter];
    if (to)
        to[c] = l->accumulates >> parameter & 1 ? to[c] + gradient : gradient;
}

/* The same for a number of each channel, or one of all. */
static void add_to(const Instruction *l, int64_t c, float gradient)
{
    float *to = l->gradients[0];
    if (to)
        to[c * l->taps] = l->accumulates & 1 || (c && !l->taps) ? to[c * l->taps] + gradient : gradient;
}

static int is_pointwise(const Instruction *l)
{
    return l->operation == RELU || l->operation == MAX_POOL || l->operation == CLIPPED || l->operation == LEAKY;
}

static void evaluate(const Instruction *l, float *v, float *scratch, int64_t threads)
{
    const float *p0 = l->parameters[0], *p1 = l->parameters[1], *p2 = l->parameters[2], *p3 = l->parameters[3];
    float *mean = v + l->out_mean, *variance = v + l->out_variance;
    const float *am = v + l->a_mean, *av = v + l->a_variance, *bm = v + l->b_mean, *bv = v + l->b_variance;
    if (l->operation == CONVOLUTION)
        bkn_convolution(l, v, scratch, threads);
    else if (l->operation == TRANSPOSED)
        bkn_transposed(l, v, scratch, threads);
    else if (l->operation == PATCHES)
        bkn_patches(l, v, scratch);
    else if (l->operation == CURVE)
        bkn_curve(l, v, threads);
    else if (is_pointwise(l))
        bkn_pointwise(l, v);
    else
        for (int64_t c = 0; c < l->channels; c++) {
            int64_t from = l->operation == GATHER ? ((const int64_t *)l->parameters[3])[c] : c;
            double scale, log_scale;
            switch (l->operation) {
            case NORM:
                mean[c] = p1 ? p1[c] : 0;
                variance[c] = p0 ? p0[c] * p0[c] : 1;
                break;
            case GIVEN:
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
            case SCALE:
                mean[c] = am[c] * p0[c * l->taps];
                variance[c] = av[c] * p0[c * l->taps] * p0[c * l->taps];
                break;
            case SHIFT:
                mean[c] = am[c] + p0[c * l->taps];
                variance[c] = av[c];
                break;
            case GATHER:
                mean[c] = am[from];
                variance[c] = av[from];
                break;
            case REFINE:
                scale = sqrt(av[c] + l->x);
                log_scale = (p1 ? p1[c] : 0) + (double)(p2 ? p2[c] : 0);
                v[l->b_mean + c] = (float)exp(log_scale); /* kept: the inflation moves before the backward pass */
                mean[c] = (float)(am[c] + ((p0 ? p0[c] : 0) + (double)(p3 ? p3[c] : 0)) * scale);
                variance[c] = av[c] * v[l->b_mean + c];
                break;
            case GAIN:
                mean[c] = (float)(gain(l) * *p1);
                break;
            }
        }
}

static void reverse(const Instruction *l, const float *v, float *g, float *scratch, int64_t threads)
{
    const float *p0 = l->parameters[0];
    const float *am = v + l->a_mean, *av = v + l->a_variance, *bm = v + l->b_mean, *bv = v + l->b_variance;
    float *gam = g + l->a_mean, *gav = g + l->a_variance, *gbm = g + l->b_mean, *gbv = g + l->b_variance;
    if (l->operation == CONVOLUTION)
        bkn_convolution_reversed(l, v, g, scratch, threads);
    else if (l->operation == TRANSPOSED)
        bkn_transposed_reversed(l, v, g, scratch, threads);
    else if (l->operation == PATCHES)
        bkn_patches_reversed(l, v, g, scratch);
    else if (l->operation == CURVE || is_pointwise(l))
        bkn_pointwise_reversed(l, v, g);
    else
        for (int64_t c = 0; c < l->channels; c++) {
            int64_t from = l->operation == GATHER ? ((const int64_t *)l->parameters[3])[c] : c;
            float gm = g[l->out_mean + c], gv = g[l->out_variance + c];
            double scale, factor;
            switch (l->operation) {
            case NORM:
                put(l, 0, c, p0 ? 2 * p0[c] * gv : 0);
                put(l, 1, c, gm);
                break;
            case GIVEN:
                put(l, 0, c, gm);
                put(l, 1, c * l->taps, gv);
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
            case SCALE:
                add_to(l, c, gm * am[c] + 2 * gv * av[c] * p0[c * l->taps]);
                gam[c] += gm * p0[c * l->taps];
                gav[c] += gv * p0[c * l->taps] * p0[c * l->taps];
                break;
            case SHIFT:
                add_to(l, c, gm);
                gam[c] += gm;
                gav[c] += gv;
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
                gav[c] += (float)(gv * factor + (p0 ? 0.5 * gm * p0[c] / scale : 0)); /* the inflation is a constant */
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

/* Memory for any one instruction: two messages in columns and their gradients. NULL where there is none. */
static float *make_scratch(const Program *p)
{
    int64_t most = 1;
    const Instruction *instructions = p->instructions;
    for (int64_t i = 0; i < p->count; i++) {
        int64_t wide = instructions[i].operation == TRANSPOSED ? instructions[i].channels : instructions[i].inputs;
        int64_t columns = wide * instructions[i].taps;
        most = columns > most ? columns : most;
    }
    return malloc(4 * most * sizeof(float));
}

int bkn_evaluate(const Program *p)
{
    float *scratch = make_scratch(p);
    const Instruction *instructions = p->instructions;
    for (int64_t i = 0; scratch && i < p->count; i++)
        evaluate(instructions + i, p->values, scratch, p->threads);
    free(scratch);
    return !scratch;
}

int bkn_reverse(const Program *p)
{
    float *scratch = make_scratch(p);
    const Instruction *instructions = p->instructions;
    for (int64_t i = p->count - 1; scratch && i >= 0; i--)
        reverse(instructions + i, p->values, p->gradients, scratch, p->threads);
    free(scratch);
    return !scratch;
}
