/* Passes over rows of a weight W, whose columns hold messages. */

#pragma once

#include "program.h"

typedef struct {
    const float *w, *mean, *variance; /* a row of W and the messages at its columns */
    float *to_weight, *to_mean, *to_variance;
    int64_t width; /* from row to row */
} Columns;

/* out = Σ m W and Σ v W² over a row of n columns. */
void bkn_products(const float *w, const float *m, const float *v, int64_t n, float *out);

/* Add Σ gm W and Σ gv W² over rows to what each column gathers, and gm m + 2 gv W v to the gradient of W. */
void bkn_columns(const Columns *columns, int64_t n, const float *gm, const float *gv, int64_t rows, int adds);
