/* What layers remember of a forward: innovations and moving statistics. The formulas stand in `tracking.py`. */

#include "calls.h"
#include "parallel.h"

static const float FARTHEST = 2980.958F, LIMIT = 2; /* e^8 of a ratio, of an innovation as a logarithm */

static float within(float value, float limit)
{
    return value > limit ? limit : value < -limit ? -limit : value;
}

static float average(const float *values, int64_t groups, int64_t stride)
{
    double sum = 0;
    for (int64_t g = 0; g < groups; g++)
        sum += values[g * stride];
    return (float)(sum / (double)groups);
}

static void move_innovation(const Tracked *t, int64_t c)
{
    const float *means = t->statistics + 2 * t->groups * t->channels, *variances = means + t->groups * t->channels;
    double spread = 0, predicted = 0, groups = (double)t->groups;
    for (int64_t g = 0; g < t->groups; g++) {
        float d = means[g * t->channels + c] - t->prior_mean[g * t->prior_stride + c];
        spread += variances[g * t->channels + c] + d * d;
        predicted += t->prior_variance[g * t->prior_stride + c];
    }
    float ratio = (float)((spread / groups + t->eps) / (predicted / groups + t->eps)), before = expf(t->innovation[c]);
    float seen = ratio * (t->inside[c] == t->innovation[c] ? before : expf(t->inside[c]));
    seen = seen > FARTHEST ? FARTHEST : seen < 1 / FARTHEST ? 1 / FARTHEST : seen;
    t->innovation[c] = within(logf(before + (float)t->weight * (seen - before)), LIMIT);
    t->sensitivity[c] = t->newest[c];
}

static void move(const void *task, int64_t first, int64_t last)
{
    for (const Tracked *t = (const Tracked *)task + first, *end = (const Tracked *)task + last; t < end; t++) {
        const float *after = t->statistics + 4 * t->groups * t->channels;
        for (int64_t c = 0; t->innovation && c < t->channels; c++)
            move_innovation(t, c);
        for (int64_t c = 0; t->running_mean && c < t->channels; c++) {
            float mean = average(t->statistics + c, t->groups, t->channels);
            float variance = average(after + c, t->groups, t->channels);
            t->running_mean[c] += (float)t->momentum * (mean - t->running_mean[c]);
            t->running_var[c] += (float)t->momentum * (variance - t->running_var[c]);
        }
    }
}

int bkn_track(const Records *all)
{
    int64_t values = 0;
    for (int64_t i = 0; i < all->count; i++)
        values += all->records[i].groups * all->records[i].channels;
    run(move, all->records, all->count, threads_for(values, all->threads));
    return 0;
}
