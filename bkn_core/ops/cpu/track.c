/* What layers remember of a forward: inflations, uncertainty and moving statistics. The formulas stand in `track.py`
   and `uncertainty.py`. */

#include "calls.h"
#include "parallel.h"

static const double LARGEST_RATIO = 2980.958, MEMORY = 0.05, LARGEST_INFLATION = 60, FIRST_NOISE = 0.1, /* as in `uncertainty.py` */
    SENSITIVITY_WEIGHT = 0.1; /* as in `inflation_gradient.py` */

typedef struct {
    double square[2], product[2], noise[2]; /* sums over channels of e², e e_before and R, of mean and variance */
} Sums;

static double clamp(double value, double low, double high)
{
    return value > high ? high : value < low ? low : value;
}

static float average(const float *values, int64_t groups, int64_t stride)
{
    double sum = 0;
    for (int64_t g = 0; g < groups; g++)
        sum += values[g * stride];
    return (float)(sum / (double)groups);
}

/* The Kalman gain P / (P + R) of the mean (0) or the variance (1), and P, neither below 0. */
static double gain_of(const float *uncertainty, int i, double *error)
{
    double noise = uncertainty[3 + i] > 0 ? uncertainty[3 + i] : 0;
    *error = uncertainty[1 + i] > 0 ? uncertainty[1 + i] : 0;
    return *error / (*error + noise > 1e-30 ? *error + noise : 1e-30);
}

/* How fast the inflations of mean and variance move. */
static void find_speeds(const Tracked *t, double *speeds)
{
    double forwards = t->uncertainty[0], by_age = 1 / (forwards > 1 ? forwards : 1);
    for (int i = 0; i < 2; i++) {
        double error, gain = gain_of(t->uncertainty, i, &error), off = error < 1 ? error : 1;
        double lost = forwards > 0 ? gain * off * off : 1, slowest = by_age > t->slowest ? by_age : t->slowest;
        speeds[i] = lost > slowest ? lost : slowest;
    }
}

static void move_inflation(const Tracked *t, int64_t c, const double *speeds, Sums *sums)
{
    const float *means = t->statistics + 2 * t->groups * t->channels, *variances = means + t->groups * t->channels;
    double spread = 0, predicted = 0, shift = 0, groups = (double)t->groups;
    for (int64_t g = 0; g < t->groups; g++) {
        double d = (double)means[g * t->channels + c] - t->prior_mean[g * t->prior_stride + c];
        spread += variances[g * t->channels + c] + d * d;
        shift += d;
        predicted += t->prior_variance[g * t->prior_stride + c];
    }
    spread /= groups, predicted /= groups, shift /= groups;
    double rest = shift * (1 - speeds[0]), mended = spread - shift * shift + rest * rest;
    mended = (mended > 0 ? mended : 0) + t->eps;
    double ratio = clamp(mended / (predicted + t->eps), 1 / LARGEST_RATIO, LARGEST_RATIO), noise[2] = {0, 0}, around = 0;
    for (int pass = 0; t->groups > 1 && pass < 2; pass++)
        for (int64_t g = 0; g < t->groups; g++) {
            double d = (double)means[g * t->channels + c] - t->prior_mean[g * t->prior_stride + c] - shift;
            double square = variances[g * t->channels + c] + d * d;
            if (pass == 0) {
                around += square / groups;
                noise[0] += d * d / (groups - 1);
            } else {
                noise[1] += (square - around) * (square - around) / (groups - 1);
            }
        }
    double before = exp(t->inflation[c]), deviation = sqrt(predicted / before + t->eps);
    double values[2] = {shift / sqrt(spread + t->eps), ratio - 1};
    if (!isfinite((float)spread))
        values[0] = values[1] = NAN;
    double after[2] = {t->mean_inflation[c] + speeds[0] * shift / deviation,
                       clamp(t->inflation[c] + log1p(speeds[1] * values[1]), -LARGEST_INFLATION, LARGEST_INFLATION)};
    noise[0] /= mended, noise[1] = isfinite((float)(mended * mended)) ? noise[1] / (mended * mended) : NAN;
    for (int i = 0; i < 2; i++) {
        float *last = t->residual + i * t->channels + c;
        double value = clamp(values[i], -1, 1);
        sums->square[i] += value * value;
        sums->product[i] += value * *last;
        sums->noise[i] += noise[i];
        if (isfinite(values[0]) && isfinite(values[1]))
            *last = (float)value;
    }
    if (isfinite((float)after[0]) && isfinite((float)after[1]) && isfinite(values[0]) && isfinite(values[1])) {
        t->mean_inflation[c] = (float)after[0];
        t->inflation[c] = (float)after[1];
    }
    float passes = t->gathered[2 * t->channels + c];
    for (int i = 0; i < 2 && passes > 0; i++) {
        float *used = t->sensitivity + i * t->channels + c;
        *used += (float)(SENSITIVITY_WEIGHT * (t->gathered[i * t->channels + c] / passes - *used));
    }
    for (int i = 0; i < 3; i++)
        t->gathered[i * t->channels + c] = 0;
}

static void move_uncertainty(const Tracked *t, const double *speeds, const Sums *sums)
{
    float *state = t->uncertainty, moved[5] = {state[0] + 1};
    int is_sound = 1;
    double groups = (double)t->groups, channels = (double)t->channels, weight = 1 / ((double)state[0] + 1), most = 0;
    weight = weight > MEMORY ? weight : MEMORY;
    for (int i = 0; i < 2; i++) {
        double square = sums->square[i] / channels, noise = sums->noise[i] / channels, error = square - noise / groups;
        if (t->groups == 1) {
            error = sums->product[i] / channels + speeds[i] * square;
            noise = square - error;
            if (state[0] == 0) /* there is nothing to compare with */
                error = noise = FIRST_NOISE;
        }
        moved[1 + i] = state[1 + i] + (float)(weight * (error - state[1 + i]));
        moved[3 + i] = state[3 + i] + (float)(weight * (noise - state[3 + i]));
        is_sound = is_sound && isfinite(moved[1 + i]) && isfinite(moved[3 + i]);
    }
    for (int i = 0; is_sound && i < 5; i++)
        state[i] = moved[i];
    if (!t->gain || state[0] == 0)
        return;
    for (int i = 0; i < 2; i++) {
        double error, gain = gain_of(state, i, &error);
        most = gain > most ? gain : most;
    }
    *t->gain = (float)most;
}

static void move_statistics(const Tracked *t, int64_t c)
{
    float mean = average(t->statistics + c, t->groups, t->channels);
    float variance = average(t->statistics + 4 * t->groups * t->channels + c, t->groups, t->channels);
    if (!isfinite(mean) || !isfinite(variance)) {
        *t->skipped = 1;
        return;
    }
    t->running_mean[c] += (float)t->momentum * (mean - t->running_mean[c]);
    t->running_var[c] += (float)t->momentum * (variance - t->running_var[c]);
}

static void move(const void *task, int64_t first, int64_t last)
{
    for (const Tracked *t = (const Tracked *)task + first, *end = (const Tracked *)task + last; t < end; t++) {
        if (t->inflation) {
            double speeds[2];
            Sums sums = {{0}, {0}, {0}};
            find_speeds(t, speeds);
            for (int64_t c = 0; c < t->channels; c++)
                move_inflation(t, c, speeds, &sums);
            move_uncertainty(t, speeds, &sums);
        }
        for (int64_t c = 0; t->running_mean && c < t->channels; c++)
            move_statistics(t, c);
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
