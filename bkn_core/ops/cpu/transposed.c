#include <string.h>

#include "columns.h"

/* The weight (I, O / groups, taps) has a row for each input. Its columns o, t gather A = Σ m W and B = Σ v W²; those whose
   taps reach the same phase f of the stride belong together:

       mean_o = mean over f of A_of + b_o,   var_o = mean over f of B_of + variance over f of A_of. */

typedef struct {
    const Instruction *op;
    const float *m, *v;
    float *a, *b, *to_m, *to_v; /* sums of the columns, or their gradients */
} Task;

static int64_t width_of(const Instruction *op)
{
    return op->channels / op->groups * op->taps;
}

/* A range of the columns of all groups. */
static void gather(const void *given, int64_t first, int64_t last)
{
    const Task *task = given;
    const Instruction *op = task->op;
    const float *weight = op->parameters[0];
    int64_t width = width_of(op), rows = op->inputs / op->groups;
    for (int64_t g = first / width; g * width < last; g++) {
        int64_t start = first > g * width ? first - g * width : 0, at = g * width + start;
        int64_t n = (last < (g + 1) * width ? last - g * width : width) - start;
        Columns columns = {weight + g * rows * width + start, NULL, NULL, NULL, task->a + at, task->b + at, width};
        bkn_columns(&columns, n, task->m + g * rows, task->v + g * rows, rows, 0);
    }
}

static int64_t column(const Instruction *op, int64_t o, int64_t tap)
{
    int64_t per_group = op->channels / op->groups, in_group = o % per_group;
    int64_t at = op->is_channels_last ? tap * per_group + in_group : in_group * op->taps + tap;
    return o / per_group * width_of(op) + at;
}

static double of_phase(const Instruction *op, const float *sums, int64_t o, int64_t phase)
{
    const int64_t *phases = op->parameters[3];
    double sum = 0;
    for (int64_t t = 0; t < op->taps; t++)
        sum += phases[t] == phase ? sums[column(op, o, t)] : 0;
    return sum;
}

static double over_phases(const Instruction *op, const float *sums, int64_t o)
{
    double sum = 0;
    for (int64_t t = 0; t < op->taps; t++)
        sum += sums[column(op, o, t)];
    return sum / op->x;
}

static void sums_of_columns(Task *task, int64_t threads)
{
    const Instruction *op = task->op;
    int64_t columns = op->channels * op->taps;
    memset(task->a, 0, columns * sizeof(float));
    memset(task->b, 0, columns * sizeof(float));
    run(gather, task, columns, threads_for(columns * op->inputs / op->groups, threads));
}

void bkn_transposed(const Instruction *op, float *values, float *scratch, int64_t threads)
{
    const float *bias = op->parameters[1];
    Task task = {op, values + op->a_mean, values + op->a_variance, scratch, scratch + op->channels * op->taps, NULL, NULL};
    sums_of_columns(&task, threads);
    for (int64_t o = 0; o < op->channels; o++) {
        double mean = over_phases(op, task.a, o), variance = over_phases(op, task.b, o);
        for (int64_t f = 0; f < op->x; f++) {
            double apart = of_phase(op, task.a, o, f) - mean;
            variance += apart * apart / op->x;
        }
        values[op->out_mean + o] = (float)(mean + (bias ? bias[o] : 0));
        values[op->out_variance + o] = (float)variance;
    }
}

VECTORIZED static void to_row(const float *w, const float *a, const float *b, int64_t n, const float *by, float *to, int adds)
{
    float m = by[0], v = 2 * by[1];
#pragma omp simd
    for (int64_t k = 0; k < n; k++)
        to[k] = (adds ? to[k] : 0) + (m * a[k] + v * w[k] * b[k]);
}

/* A range of the inputs. */
static void rows_reversed(const void *given, int64_t first, int64_t last)
{
    const Task *task = given;
    const Instruction *op = task->op;
    int64_t width = width_of(op), rows = op->inputs / op->groups;
    for (int64_t i = first; i < last; i++) {
        const float *w = (const float *)op->parameters[0] + i * width;
        const float *a = task->a + i / rows * width, *b = task->b + i / rows * width;
        float out[2], by[] = {task->m[i], task->v[i]};
        bkn_products(w, a, b, width, out);
        task->to_m[i] += out[0];
        task->to_v[i] += out[1];
        if (op->gradients[0])
            to_row(w, a, b, width, by, op->gradients[0] + i * width, op->accumulates & 1);
    }
}

void bkn_transposed_reversed(const Instruction *op, const float *values, float *gradients, float *scratch, int64_t threads)
{
    int64_t columns = op->channels * op->taps;
    const int64_t *phases = op->parameters[3];
    Task task = {op, values + op->a_mean, values + op->a_variance, scratch, scratch + columns,
                 gradients + op->a_mean, gradients + op->a_variance};
    sums_of_columns(&task, threads);
    float *to_a = scratch + 2 * columns, *to_b = scratch + 3 * columns;
    for (int64_t o = 0; o < op->channels; o++) {
        float gm = gradients[op->out_mean + o], gv = gradients[op->out_variance + o];
        double mean = over_phases(op, task.a, o);
        for (int64_t t = 0; t < op->taps; t++) {
            double apart = of_phase(op, task.a, o, phases[t]) - mean;
            to_a[column(op, o, t)] = (float)((gm + 2 * gv * apart) / op->x);
            to_b[column(op, o, t)] = (float)(gv / op->x);
        }
        if (op->gradients[1])
            op->gradients[1][o] = gm + (op->accumulates & 2 ? op->gradients[1][o] : 0);
    }
    task.a = to_a, task.b = to_b;
    run(rows_reversed, &task, op->inputs, threads_for(columns * op->inputs / op->groups, threads));
}
