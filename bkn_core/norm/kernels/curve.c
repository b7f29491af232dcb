/* Moments of any function of each value by itself, by quadrature. The function is code for a stack of points: pairs of an
   operation and a number, after their count. Each level of the stack holds values and slopes at all points. */

#include <string.h>

#include "pointwise.h"

enum { POINTS = 84, LEVELS = 6 }; /* points are filled up to whole vectors with such of no mass */
enum Code { POINT, NUMBER, COPY, SWAP, PLUS, TIMES, FACTOR, TERM, ABOVE, BELOW, FROM, UPTO, SIGMOID, EXP, CDF, RECIPROCAL };

typedef struct {
    double value[POINTS], slope[POINTS];
} Level;

#define EACH for (int i = 0; i < POINTS; i++)
#define INLINE static inline __attribute__((always_inline))

/* e^x to eleven digits without a branch, so that compilers vectorize it; which they do not where they know how far x may
   be from 0. */
INLINE double exponential(double x, double far)
{
    const double rounding = 0x1.8p52;
    x = x < -far ? -far : x;
    x = x > far ? far : x;
    double shifted = x * 1.4426950408889634 + rounding, whole = shifted - rounding;
    double r = x - whole * 0.693147180369123816490 - whole * 1.90821492927058770002e-10;
    double sum = 1.0 / 362880;
    sum = sum * r + 1.0 / 40320;
    sum = sum * r + 1.0 / 5040;
    sum = sum * r + 1.0 / 720;
    sum = sum * r + 1.0 / 120;
    sum = sum * r + 1.0 / 24;
    sum = sum * r + 1.0 / 6;
    sum = sum * r + 0.5;
    sum = sum * r + 1;
    sum = sum * r + 1;
    uint64_t bits;
    double power;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 52) + ((uint64_t)1023 << 52);
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* Φ(x) to a part in 10^7, by a fraction of Chebyshev's kind. */
INLINE double cumulated(double x, double far)
{
    double z = fabs(x) * M_SQRT1_2, t = 1 / (1 + 0.5 * z);
    double sum = 0.17087277;
    sum = sum * t - 0.82215223;
    sum = sum * t + 1.48851587;
    sum = sum * t - 1.13520398;
    sum = sum * t + 0.27886807;
    sum = sum * t - 0.18628806;
    sum = sum * t + 0.09678418;
    sum = sum * t + 0.37409196;
    sum = sum * t + 1.00002368;
    double tail = 0.5 * t * exponential(-z * z - 1.26551223 + t * sum, far);
    return 0.5 + copysign(0.5 - tail, x);
}

INLINE void apply(int64_t code, double number, Level *top)
{
    double *v = top->value, *s = top->slope;
    switch (code) {
    case FACTOR:
        EACH v[i] *= number, s[i] *= number;
        break;
    case TERM:
        EACH v[i] += number;
        break;
    case ABOVE:
        EACH s[i] = v[i] > number ? s[i] : 0, v[i] = v[i] > number ? v[i] : number;
        break;
    case BELOW:
        EACH s[i] = v[i] < number ? s[i] : 0, v[i] = v[i] < number ? v[i] : number;
        break;
    case FROM:
        EACH s[i] = v[i] >= number ? s[i] : 0, v[i] = v[i] >= number ? v[i] : number;
        break;
    case UPTO:
        EACH s[i] = v[i] <= number ? s[i] : 0, v[i] = v[i] <= number ? v[i] : number;
        break;
    case SIGMOID:
        EACH
        {
            double sigmoid = 1 / (1 + exponential(-v[i], number));
            s[i] *= sigmoid * (1 - sigmoid), v[i] = sigmoid;
        }
        break;
    case EXP:
        EACH v[i] = exponential(v[i], number), s[i] *= v[i];
        break;
    case CDF:
        EACH s[i] *= exponential(-0.5 * v[i] * v[i], number) * 0.3989422804014327, v[i] = cumulated(v[i], number);
        break;
    case RECIPROCAL:
        EACH v[i] = 1 / v[i], s[i] *= -v[i] * v[i];
        break;
    }
}

INLINE void join(int64_t code, Level *a, Level *b)
{
    if (code == PLUS)
        EACH a->value[i] += b->value[i], a->slope[i] += b->slope[i];
    else if (code == TIMES)
        EACH a->slope[i] = a->slope[i] * b->value[i] + b->slope[i] * a->value[i], a->value[i] *= b->value[i];
    else
        EACH
        {
            double value = a->value[i], slope = a->slope[i];
            a->value[i] = b->value[i], a->slope[i] = b->slope[i], b->value[i] = value, b->slope[i] = slope;
        }
}

INLINE void run_code(const int64_t *code, const Level *points, Level *stack)
{
    Level *top = stack - 1;
    for (int64_t i = 0; i < code[0]; i++) {
        int64_t what = code[1 + 2 * i];
        double number;
        memcpy(&number, code + 2 + 2 * i, sizeof number);
        if (what == POINT)
            *++top = *points;
        else if (what == NUMBER) {
            top++;
            EACH top->value[i] = number, top->slope[i] = 0;
        } else if (what == COPY)
            top++, *top = top[-1];
        else if (what == SWAP)
            join(what, top - 1, top);
        else if (what == PLUS || what == TIMES)
            join(what, top - 1, top), top--;
        else
            apply(what, number, top);
    }
}

/* The distribution of the largest of `count` values: sorted, the power of the cumulated mass, taken apart again. */
static void take_largest(double count, Level *result, double *nodes, double *mass)
{
    for (int i = 1; i < NODES; i++)
        for (int j = i; j > 0 && result->value[j - 1] > result->value[j]; j--) {
            double *columns[] = {result->value, result->slope, nodes, mass};
            for (int k = 0; k < 4; k++) {
                double other = columns[k][j];
                columns[k][j] = columns[k][j - 1], columns[k][j - 1] = other;
            }
        }
    double sum = 0, before = 0;
    for (int i = 0; i < NODES; i++) {
        sum += mass[i];
        double power = pow(sum < 1 ? sum : 1, count);
        mass[i] = power - before, before = power;
    }
}

INLINE Moments moments(const Level *f, const double *nodes, const double *mass)
{
    double mean = 0, square = 0, by_mean = 0, by_deviation = 0, square_by_mean = 0, square_by_deviation = 0;
#pragma omp simd reduction(+ : mean)
    EACH mean += mass[i] * f->value[i];
#pragma omp simd reduction(+ : square, by_mean, by_deviation, square_by_mean, square_by_deviation)
    EACH
    {
        double apart = f->value[i] - mean, slope = mass[i] * f->slope[i];
        square += mass[i] * apart * apart;
        by_mean += slope;
        by_deviation += slope * nodes[i];
        square_by_mean += 2 * slope * apart;
        square_by_deviation += 2 * slope * apart * nodes[i];
    }
    Moments found = {mean, square, by_mean, by_deviation, square_by_mean, square_by_deviation};
    return found;
}

typedef struct {
    const Line *line;
    float *values;
    double nodes[POINTS], mass[POINTS];
} Task;

VECTORIZED static void channels(const void *given, int64_t first, int64_t last)
{
    const Task *task = given;
    const Line *l = task->line;
    for (int64_t c = first; c < last; c++) {
        Level points, stack[LEVELS];
        double nodes[POINTS], mass[POINTS], variance = task->values[l->a_variance + c];
        double mean = task->values[l->a_mean + c], deviation = sqrt(variance > FLOOR ? variance : FLOOR);
        EACH points.value[i] = mean + deviation * task->nodes[i], points.slope[i] = 1;
        run_code(l->parameters[3], &points, stack);
        memcpy(nodes, task->nodes, sizeof nodes), memcpy(mass, task->mass, sizeof mass);
        if (l->x != 1)
            take_largest(l->x, stack, nodes, mass);
        keep(l, task->values, c, moments(stack, nodes, mass));
    }
}

void bkn_curve(const Line *line, float *values, int64_t threads)
{
    Task task = {line, values, {0}, {0}};
    double total = 0;
    for (int i = 0; i < NODES; i++) {
        task.nodes[i] = node(i), task.mass[i] = exp(-0.5 * node(i) * node(i));
        total += task.mass[i];
    }
    for (int i = 0; i < NODES; i++)
        task.mass[i] /= total;
    run(channels, &task, line->channels, threads_for(POINTS * line->channels, threads));
}
