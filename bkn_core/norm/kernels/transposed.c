#include <string.h>

#include "columns.h"

/* The weight (I, O / groups, taps) has a row for each input. Its columns o, t gather A = Σ m W and B = Σ v W²; those whose
   taps reach the same phase f of the stride belong together:

       mean_o = mean over f of A_of + b_o,   var_o = mean over f of B_of + variance over f of A_of. */

typedef struct {
    const Line *line;
    const float *m, *v;
    float *a, *b, *to_m, *to_v; /* sums of the columns, or their gradients */
} Task;

static int64_t width_of(const Line *line)
{
    return line->channels / line->groups * line->taps;
}

/* A range of the columns of all groups. */
static void gather(const void *given, int64_t first, int64_t last)
{
    const Task *task = given;
    const Line *line = task->line;
    const float *weight = line->parameters[0];
    int64_t width = width_of(line), rows = line->inputs / line->groups;
    for (int64_t g = first / width; g * width < last; g++) {
        int64_t start = first > g * width ? first - g * width : 0, at = g * width + start;
        int64_t n = (last < (g + 1) * width ? last - g * width : width) - start;
        Columns columns = {weight + g * rows * width + start, NULL, NULL, NULL, task->a + at, task->b + at, width};
        bkn_columns(&columns, n, task->m + g * rows, task->v + g * rows, rows, 0);
    }
}

static int64_t column(const Line *line, int64_t o, int64_t tap)
{
    int64_t per_group = line->channels / line->groups, in_group = o % per_group;
    int64_t at = line->is_channels_last ? tap * per_group + in_group : in_group * line->taps + tap;
    return o / per_group * width_of(line) + at;
}

static double of_phase(const Line *line, const float *sums, int64_t o, int64_t phase)
{
    const int64_t *phases = line->parameters[3];
    double sum = 0;
    for (int64_t t = 0; t < line->taps; t++)
        sum += phases[t] == phase ? sums[column(line, o, t)] : 0;
    return sum;
}

static double over_phases(const Line *line, const float *sums, int64_t o)
{
    double sum = 0;
    for (int64_t t = 0; t < line->taps; t++)
        sum += sums[column(line, o, t)];
    return sum / line->x;
}

static void sums_of_columns(Task *task, int64_t threads)
{
    const Line *line = task->line;
    int64_t columns = line->channels * line->taps;
    memset(task->a, 0, columns * sizeof(float));
    memset(task->b, 0, columns * sizeof(float));
    run(gather, task, columns, threads_for(columns * line->inputs / line->groups, threads));
}

void bkn_transposed(const Line *line, float *values, float *room, int64_t threads)
{
    const float *bias = line->parameters[1];
    Task task = {line, values + line->a_mean, values + line->a_variance, room, room + line->channels * line->taps, NULL, NULL};
    sums_of_columns(&task, threads);
    for (int64_t o = 0; o < line->channels; o++) {
        double mean = over_phases(line, task.a, o), variance = over_phases(line, task.b, o);
        for (int64_t f = 0; f < line->x; f++) {
            double apart = of_phase(line, task.a, o, f) - mean;
            variance += apart * apart / line->x;
        }
        values[line->out_mean + o] = (float)(mean + (bias ? bias[o] : 0));
        values[line->out_variance + o] = (float)variance;
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
    const Line *line = task->line;
    int64_t width = width_of(line), rows = line->inputs / line->groups;
    for (int64_t i = first; i < last; i++) {
        const float *w = (const float *)line->parameters[0] + i * width;
        const float *a = task->a + i / rows * width, *b = task->b + i / rows * width;
        float out[2], by[] = {task->m[i], task->v[i]};
        bkn_products(w, a, b, width, out);
        task->to_m[i] += out[0];
        task->to_v[i] += out[1];
        if (line->gradients[0])
            to_row(w, a, b, width, by, line->gradients[0] + i * width, line->accumulates & 1);
    }
}

void bkn_transposed_reversed(const Line *line, const float *values, float *gradients, float *room, int64_t threads)
{
    int64_t columns = line->channels * line->taps;
    const int64_t *phases = line->parameters[3];
    Task task = {line, values + line->a_mean, values + line->a_variance, room, room + columns,
                 gradients + line->a_mean, gradients + line->a_variance};
    sums_of_columns(&task, threads);
    float *to_a = room + 2 * columns, *to_b = room + 3 * columns;
    for (int64_t o = 0; o < line->channels; o++) {
        float gm = gradients[line->out_mean + o], gv = gradients[line->out_variance + o];
        double mean = over_phases(line, task.a, o);
        for (int64_t t = 0; t < line->taps; t++) {
            double apart = of_phase(line, task.a, o, phases[t]) - mean;
            to_a[column(line, o, t)] = (float)((gm + 2 * gv * apart) / line->x);
            to_b[column(line, o, t)] = (float)(gv / line->x);
        }
        if (line->gradients[1])
            line->gradients[1][o] = gm + (line->accumulates & 2 ? line->gradients[1][o] : 0);
    }
    task.a = to_a, task.b = to_b;
    run(rows_reversed, &task, line->inputs, threads_for(columns * line->inputs / line->groups, threads));
}
