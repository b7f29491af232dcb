#include <string.h>

#include "columns.h"

/* Lay a message out for the columns of W as a matrix (O, inputs / groups * taps), one row of columns per group. */
static void lay_out(const Instruction *op, const float *message, float *columns)
{
    int64_t inner = op->inputs / op->groups, taps = op->taps;
    for (int64_t g = 0; g < op->groups; g++, message += inner, columns += inner * taps)
        if (op->is_channels_last)
            for (int64_t t = 0; t < taps; t++)
                memcpy(columns + t * inner, message, inner * sizeof(float));
        else
            for (int64_t c = 0; c < inner; c++)
                for (int64_t t = 0; t < taps; t++)
                    columns[c * taps + t] = message[c];
}

static void gather_columns(const Instruction *op, const float *columns, float *message)
{
    int64_t inner = op->inputs / op->groups, taps = op->taps;
    for (int64_t g = 0; g < op->groups; g++, message += inner, columns += inner * taps)
        if (op->is_channels_last)
            for (int64_t t = 0; t < taps; t++)
                for (int64_t c = 0; c < inner; c++)
                    message[c] += columns[t * inner + c];
        else
            for (int64_t c = 0; c < inner; c++)
                for (int64_t t = 0; t < taps; t++)
                    message[c] += columns[c * taps + t];
}

typedef struct {
    const Instruction *op;
    const float *mean, *variance, *to_out_mean, *to_out_variance; /* messages in columns; gradients of the result */
    float *out_mean, *out_variance, *to_mean, *to_variance;
} Task;

VECTORIZED void bkn_products(const float *w, const float *m, const float *v, int64_t n, float *out)
{
    float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean, variance)
    for (int64_t k = 0; k < n; k++) {
        mean += w[k] * m[k];
        variance += w[k] * w[k] * v[k];
    }
    out[0] = mean;
    out[1] = variance;
}

static void rows(const void *given, int64_t first, int64_t last)
{
    const Task *task = given;
    const Instruction *op = task->op;
    const float *weight = op->parameters[0], *bias = op->parameters[1];
    int64_t width = op->inputs / op->groups * op->taps, per_group = op->channels / op->groups;
    for (int64_t o = first; o < last; o++) {
        float out[2];
        int64_t at = o / per_group * width;
        bkn_products(weight + o * width, task->mean + at, task->variance + at, width, out);
        task->out_mean[o] = out[0] + (bias ? bias[o] : 0);
        task->out_variance[o] = out[1];
    }
}

void bkn_convolution(const Instruction *op, float *values, float *scratch, int64_t threads)
{
    int64_t columns = op->inputs * op->taps;
    float *mean = scratch, *variance = mean + columns;
    lay_out(op, values + op->a_mean, mean);
    lay_out(op, values + op->a_variance, variance);
    Task task = {op, mean, variance, NULL, NULL, values + op->out_mean, values + op->out_variance, NULL, NULL};
    run(rows, &task, op->channels, threads_for(columns / op->groups * op->channels, threads));
}

/* Rows of W are taken by four: what belongs to a column is then read and written once for all of them. */
enum { TOGETHER = 4 };

static inline __attribute__((always_inline)) void reverse_rows(
    const Columns *c, int64_t n, const float *gm, const float *gv, int count, int wants_weight, int adds)
{
    const float *w = c->w, *m = c->mean, *v = c->variance;
    float *to_weight = c->to_weight, *to_mean = c->to_mean, *to_variance = c->to_variance;
    int64_t width = c->width;
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        float mean = to_mean[k], variance = to_variance[k];
        for (int r = 0; r < count; r++) {
            float value = w[r * width + k], part = gv[r] * value;
            mean += gm[r] * value;
            variance += part * value;
            if (wants_weight) {
                float gradient = gm[r] * m[k] + 2 * part * v[k];
                to_weight[r * width + k] = adds ? to_weight[r * width + k] + gradient : gradient;
            }
        }
        to_mean[k] = mean;
        to_variance[k] = variance;
    }
}

VECTORIZED static void reverse(const Columns *c, int64_t n, const float *gm, const float *gv, int64_t count, int adds)
{
    if (!c->to_weight)
        for (int64_t r = 0; r < count; r++) {
            Columns row = *c;
            row.w += r * c->width;
            reverse_rows(&row, n, gm + r, gv + r, 1, 0, 0);
        }
    else if (count == TOGETHER && adds)
        reverse_rows(c, n, gm, gv, TOGETHER, 1, 1);
    else if (count == TOGETHER)
        reverse_rows(c, n, gm, gv, TOGETHER, 1, 0);
    else
        for (int64_t r = 0; r < count; r++) {
            Columns row = *c;
            row.w += r * c->width, row.to_weight += r * c->width;
            if (adds)
                reverse_rows(&row, n, gm + r, gv + r, 1, 1, 1);
            else
                reverse_rows(&row, n, gm + r, gv + r, 1, 1, 0);
        }
}

void bkn_columns(const Columns *columns, int64_t n, const float *gm, const float *gv, int64_t rows, int adds)
{
    for (int64_t o = 0, count; o < rows; o += count) {
        Columns four = *columns;
        count = rows - o < TOGETHER ? rows - o : TOGETHER;
        four.w += o * four.width;
        if (four.to_weight)
            four.to_weight += o * four.width;
        reverse(&four, n, gm + o, gv + o, count, adds);
    }
}

/* A range of the columns of all groups: no two threads add to the same number. */
static void columns_reversed(const void *given, int64_t first, int64_t last)
{
    const Task *task = given;
    const Instruction *op = task->op;
    const float *weight = op->parameters[0];
    int64_t width = op->inputs / op->groups * op->taps, per_group = op->channels / op->groups;
    for (int64_t g = first / width; g * width < last; g++) {
        int64_t start = first > g * width ? first - g * width : 0;
        int64_t n = (last < (g + 1) * width ? last - g * width : width) - start, at = g * width + start;
        int64_t o = g * per_group;
        float *to_weight = op->gradients[0] ? op->gradients[0] + o * width + start : NULL;
        Columns columns = {weight + o * width + start, task->mean + at, task->variance + at,
                           to_weight, task->to_mean + at, task->to_variance + at, width};
        bkn_columns(&columns, n, task->to_out_mean + o, task->to_out_variance + o, per_group, op->accumulates & 1);
    }
}

void bkn_convolution_reversed(const Instruction *op, const float *values, float *gradients, float *scratch, int64_t threads)
{
    int64_t columns = op->inputs * op->taps;
    float *mean = scratch, *variance = mean + columns, *to_mean = mean + 2 * columns, *to_variance = mean + 3 * columns;
    memset(to_mean, 0, 2 * columns * sizeof(float));
    lay_out(op, values + op->a_mean, mean);
    lay_out(op, values + op->a_variance, variance);
    const float *gm = gradients + op->out_mean, *gv = gradients + op->out_variance;
    Task task = {op, mean, variance, gm, gv, NULL, NULL, to_mean, to_variance};
    run(columns_reversed, &task, columns, threads_for(columns / op->groups * op->channels, threads));
    gather_columns(op, to_mean, gradients + op->a_mean);
    gather_columns(op, to_variance, gradients + op->a_variance);
    if (op->gradients[1])
        for (int64_t o = 0; o < op->channels; o++)
            op->gradients[1][o] = gm[o] + (op->accumulates & 2 ? op->gradients[1][o] : 0);
}

/* Patches of the network input, whose mean p and covariance P are known: mean W p + b, variance rowsum((W P) * W).
   A covariance of which only the diagonal is known has as many values as the mean. */
static void row_of_patches(const Instruction *op, int64_t o, float *row)
{
    const float *weight = (const float *)op->parameters[0] + o * op->inputs;
    int64_t inner = op->inputs / op->taps;
    for (int64_t k = 0; k < op->inputs; k++)
        row[k] = weight[op->is_channels_last ? k % op->taps * inner + k / op->taps : k];
}

static void times_covariance(const Instruction *op, const float *row, float *product)
{
    const float *covariance = op->parameters[3];
    for (int64_t k = 0; k < op->inputs; k++)
        product[k] = 0;
    for (int64_t j = 0; j < op->inputs; j++) {
        if (op->groups) /* here: whether the whole matrix is known */
            for (int64_t k = 0; k < op->inputs; k++)
                product[k] += row[j] * covariance[j * op->inputs + k];
        else
            product[j] = row[j] * covariance[j];
    }
}

void bkn_patches(const Instruction *op, float *values, float *scratch)
{
    const float *bias = op->parameters[1], *mean = op->parameters[2];
    float *row = scratch, *product = row + op->inputs;
    for (int64_t o = 0; o < op->channels; o++) {
        row_of_patches(op, o, row);
        times_covariance(op, row, product);
        double expected = bias ? bias[o] : 0, variance = 0;
        for (int64_t k = 0; k < op->inputs; k++) {
            expected += (double)row[k] * mean[k];
            variance += (double)row[k] * product[k];
        }
        values[op->out_mean + o] = (float)expected;
        values[op->out_variance + o] = (float)(variance > 0 ? variance : 0);
    }
}

void bkn_patches_reversed(const Instruction *op, const float *values, const float *gradients, float *scratch)
{
    const float *mean = op->parameters[2];
    int64_t inner = op->inputs / op->taps;
    float *row = scratch, *product = row + op->inputs;
    for (int64_t o = 0; o < op->channels; o++) {
        float gm = gradients[op->out_mean + o];
        float gv = values[op->out_variance + o] > 0 ? 2 * gradients[op->out_variance + o] : 0;
        if (op->gradients[1])
            op->gradients[1][o] = gm + (op->accumulates & 2 ? op->gradients[1][o] : 0);
        if (!op->gradients[0])
            continue;
        row_of_patches(op, o, row);
        times_covariance(op, row, product);
        float *to_weight = op->gradients[0] + o * op->inputs;
        for (int64_t k = 0; k < op->inputs; k++) {
            int64_t at = op->is_channels_last ? k % op->taps * inner + k / op->taps : k;
            float gradient = gm * mean[k] + gv * product[k];
            to_weight[at] = gradient + (op->accumulates & 1 ? to_weight[at] : 0);
        }
    }
}
