/* What the kernels are called with, from Python (as 64-bit slots in this order) and from `extension.cpp`. */

#pragma once

#include <stdint.h>

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* types of activations, as in `kernels.py`; all else is float32 */

typedef struct {
    int64_t groups, images, channels, length, is_channels_last, threads, type;
    const void *x;
    const float *prior_mean, *prior_variance;     /* no prior: NULL */
    int64_t prior_stride;                         /* channels where each group has its own prior, else 0 */
    const float *gain, *weight, *bias;            /* no affine: NULL */
    void *y;
    float *statistics;                            /* (6, G, C), see `normalize.py` */
    double eps;
    /* of this call, not set by the caller: */
    const struct Passes *passes;
    int64_t parts;
    struct Moments *partial;
    float *coefficients; /* (G, 3, C): scale, mean, bias */
    int *failed;         /* a thread found no memory */
} Forward;

typedef struct {
    int64_t groups, images, channels, length, is_channels_last, threads, type;
    const void *dy, *x;
    const float *prior_mean, *prior_variance;
    int64_t prior_stride;
    const float *gain, *weight, *statistics, *to_statistics; /* gradient of the statistics or NULL */
    void *dx;
    float *to_weight, *to_bias;                              /* no weight: NULL */
    float *to_prior_mean, *to_prior_variance;                /* (C,) or (G, C) */
    float *to_gain;
    const float *sensitivity;                                /* (2, C): of the variance, of the mean */
    float *gathered;                                         /* sums of it, NULL to follow no inflation */
    double eps;
    /* of this call, not set by the caller: */
    const struct Passes *passes;
    int64_t parts;
    double *sums;        /* (G, parts, C, 2) */
    float *coefficients; /* (G, 4, C): dx = k0 dy + (k1 (x - k2) + k3) */
    double *gain_parts;  /* (C,) */
    int *failed;         /* a thread found no memory */
    double usual[2];     /* by how much a sensitivity may differ from its running mean */
    double own_part;     /* of what is beyond it, that is followed */
} Backward;

typedef struct {
    int64_t groups, channels;
    const float *statistics;                  /* (6, G, C), see `normalize.py` */
    const float *prior_mean, *prior_variance; /* no inflation: NULL */
    int64_t prior_stride;                     /* channels where each group has its own prior, else 0 */
    float *inflation, *mean_inflation, *sensitivity, *residual; /* (C,), (C,), (2, C), (2, C) */
    float *gathered;                   /* (3, C), see `inflation_gradient.py` */
    float *uncertainty;                /* (5,), see `uncertainty.py` */
    float *gain;                       /* NULL where it is not computed */
    float *running_mean, *running_var; /* no moving statistics: NULL */
    double slowest, momentum, eps;     /* least speed of an inflation, weight of the newest statistics */
    int64_t *skipped;                  /* set where a statistic was not finite */
} Tracked;

typedef struct {
    int64_t count, threads; /* one thread where a layer is there twice */
    const Tracked *records;
} Records;

typedef struct {
    int64_t count, threads;
    float *values, *gradients; /* the arenas */
    const void *instructions;         /* see `program.h` */
} Program;
