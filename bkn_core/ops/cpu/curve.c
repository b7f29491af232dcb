/* Moments of any function of each value by itself, by quadrature. The function is code for a stack of points: pairs of an
   operation and a number, after their count. Each level of the stack holds values and slopes at all points. */

#include <string.h>

#include "pointwise.h"

enum { POINTS = 88, LEVELS = 6 }; /* points are filled up to whole vectors with such of no mass */
enum Code { POINT, NUMBER, COPY, SWAP, PLUS, TIMES, FACTOR, TERM, ABOVE, BELOW, FROM, UPTO, SIGMOID, EXP, CDF, RECIPROCAL };

typedef struct {
    float value[POINTS], slope[POINTS];
} Level;

#define EACH for (int i = 0; i < POINTS; i++)
#define INLINE static inline __attribute__((always_inline))

/* e^x to the last bits without a branch, so that compilers vectorize it; which they do not where they know how far x may
   be from 0. */
INLINE float exponential(float x, float far)
{
    const float rounding = 0x1.8p23f;
    x = x < -far ? -far : x;
    x = x > far ? far : x;
    float shifted = x * 1.44269504f + rounding, whole = shifted - rounding;
    float r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    uint32_t bits;
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127u << 23);
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* Φ(x) to a part in 10^7, by a fraction of Chebyshev's kind. */
INLINE float cumulated(float x, float far)
{
    float z = fabsf(x) * (float)M_SQRT1_2, t = 1 / (1 + 0.5f * z), sum = 0.17087277f;
    sum = sum * t - 0.82215223f;
    sum = sum * t + 1.48851587f;
    sum = sum * t - 1.13520398f;
    sum = sum * t + 0.27886807f;
    sum = sum * t - 0.18628806f;
    sum = sum * t + 0.09678418f;
    sum = sum * t + 0.37409196f;
    sum = sum * t + 1.00002368f;
    float tail = 0.5f * t * exponential(-z * z - 1.26551223f + t * sum, far);
    return 0.5f + copysignf(0.5f - tail, x);
}

INLINE void apply(int64_t code, float number, Level *top)
{
    float *v = top->value, *s = top->slope;
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
            float sigmoid = 1 / (1 + exponential(-v[i], number));
            s[i] *= sigmoid * (1 - sigmoid), v[i] = sigmoid;
        }
        break;
    case EXP:
        EACH v[i] = exponential(v[i], number), s[i] *= v[i];
        break;
    case CDF:
        EACH s[i] *= exponential(-0.5f * v[i] * v[i], number) * 0.39894228f, v[i] = cumulated(v[i], number);
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
            float value = a->value[i], slope = a->slope[i];
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
            EACH top->value[i] = (float)number, top->slope[i] = 0;
        } else if (what == COPY)
            top++, *top = top[-1];
        else if (what == SWAP)
            join(what, top - 1, top);
        else if (what == PLUS || what == TIMES)
            join(what, top - 1, top), top--;
        else
            apply(what, (float)number, top);
    }
}

/* The distribution of the largest of `count` values: sorted, the power of the cumulated mass, taken apart again. */
static void take_largest(double count, Level *result, float *nodes, float *mass)
{
    for (int i = 1; i < NODES; i++)
        for (int j = i; j > 0 && result->value[j - 1] > result->value[j]; j--) {
            float *columns[] = {result->value, result->slope, nodes, mass};
            for (int k = 0; k < 4; k++) {
                float other = columns[k][j];
                columns[k][j] = columns[k][j - 1], columns[k][j - 1] = other;
            }
        }
    double sum = 0, before = 0;
    for (int i = 0; i < NODES; i++) {
        sum += mass[i];
        double power = pow(sum < 1 ? sum : 1, count);
        mass[i] = (float)(power - before), before = power;
    }
}

INLINE Moments moments(const Level *f, const float *nodes, const float *mass)
{
    float mean = 0, square = 0, by_mean = 0, by_deviation = 0, square_by_mean = 0, square_by_deviation = 0;
#pragma omp simd reduction(+ : mean)
    EACH mean += mass[i] * f->value[i];
#pragma omp simd reduction(+ : square, by_mean, by_deviation, square_by_mean, square_by_deviation)
    EACH
    {
        float apart = f->value[i] - mean, slope = mass[i] * f->slope[i];
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
    const Instruction *op;
    float *values;
    float nodes[POINTS], mass[POINTS];
} Task;

VECTORIZED static void channels(const void *given, int64_t first, int64_t last)
{
    const Task *task = given;
    const Instruction *l = task->op;
    for (int64_t c = first; c < last; c++) {
        Level points, stack[LEVELS];
        float nodes[POINTS], mass[POINTS], mean = task->values[l->a_mean + c], variance = task->values[l->a_variance + c];
        float deviation = sqrtf(variance > (float)FLOOR ? variance : (float)FLOOR);
        EACH points.value[i] = mean + deviation * task->nodes[i], points.slope[i] = 1;
        run_code(l->parameters[3], &points, stack);
        memcpy(nodes, task->nodes, sizeof nodes), memcpy(mass, task->mass, sizeof mass);
        if (l->x != 1)
            take_largest(l->x, stack, nodes, mass);
        keep(l, task->values, c, moments(stack, nodes, mass));
    }
}

void bkn_curve(const Instruction *op, float *values, int64_t threads)
{
    Task task = {op, values, {0}, {0}};
    double total = 0;
    for (int i = 0; i < NODES; i++)
        total += exp(-0.5 * node(i) * node(i));
    for (int i = 0; i < NODES; i++)
        task.nodes[i] = (float)node(i), task.mass[i] = (float)(exp(-0.5 * node(i) * node(i)) / total);
    run(channels, &task, op->channels, threads_for(POINTS * op->channels, threads));
}
