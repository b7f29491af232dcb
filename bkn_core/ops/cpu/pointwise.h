/* Moments of functions of a Gaussian, and their derivatives, which are kept for the way back. */

#pragma once

#include "program.h"

static const double FLOOR = 1e-12; /* under the square roots: a layer with γ = 0 predicts variance 0 */

enum { NODES = 81 }; /* of the quadrature, as in `propagate.py` */
enum { KEPT = 4 };   /* derivatives of a channel: of mean and variance by the mean, then both by the variance */

static inline double node(int i)
{
    return (i - 40) / 5.0;
}

typedef struct {
    double mean, variance;
    double mean_by_mean, mean_by_deviation, variance_by_mean, variance_by_deviation;
} Moments;

static inline void keep(const Instruction *l, float *v, int64_t c, Moments m)
{
    double given = v[l->a_variance + c], by_variance = given >= FLOOR ? 0.5 / sqrt(given) : 0;
    float *kept = v + l->b_mean + KEPT * c;
    v[l->out_mean + c] = (float)m.mean;
    v[l->out_variance + c] = (float)m.variance;
    kept[0] = (float)m.mean_by_mean;
    kept[1] = (float)m.variance_by_mean;
    kept[2] = (float)(m.mean_by_deviation * by_variance);
    kept[3] = (float)(m.variance_by_deviation * by_variance);
}
