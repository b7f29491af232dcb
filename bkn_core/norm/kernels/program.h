/* A program of lines that push mean and variance per channel from one normalization layer to the next, and its reverse.

   `wiring/writers.py` writes the lines; `propagate.py` says what each does. A value lives in an arena of floats, its mean and
   its variance at two offsets; gradients live in a second arena at the same offsets. */

#pragma once

#include "parallel.h"

enum Operation {
    NORM, GIVEN, CONVOLUTION, PATCHES, RELU, ADD, MULTIPLY, AFFINE, GATHER, REFINE, AVERAGE, MAX_POOL, GAIN,
    CURVE, CLIPPED, LEAKY, TRANSPOSED, SCALE, SHIFT
};

typedef struct {
    int64_t operation, channels;
    int64_t out_mean, out_variance, a_mean, a_variance, b_mean, b_variance; /* offsets of the result and the operands */
    int64_t inputs;                 /* channels of the first operand; width of a patch */
    int64_t taps, groups, is_channels_last; /* of a weight; taps is the step of a given variance as well */
    int64_t accumulates;            /* bit i: the gradient of parameter i holds the part of a later line already */
    const void *parameters[4];      /* NULL where there is none; the last may be numbers that the line is told */
    float *gradients[4];            /* NULL where none is wanted */
    double x, y;                    /* numbers of an affine map; x is eps of a refinement, the variance's factor of an
                                       average, the number of a maximum, whose y says whether its values are rectified,
                                       and whether a gain is learned: the sigmoid of its parameter;
                                       bounds of a clipped value, the slope of a leaky rectifier, phases of a stride */
} Line;

/* Reads and writes W once per line and direction; `columns` are the messages laid out once per tap, and
   `room` holds as much. */
void bkn_convolution(const Line *line, float *values, float *room, int64_t threads);
void bkn_convolution_reversed(const Line *line, const float *values, float *gradients, float *room, int64_t threads);
void bkn_patches(const Line *line, float *values, float *room);
void bkn_patches_reversed(const Line *line, const float *values, const float *gradients, float *room);

/* Transposed convolutions are convolutions with the directions exchanged. The line is told the phase of each tap. */
void bkn_transposed(const Line *line, float *values, float *room, int64_t threads);
void bkn_transposed_reversed(const Line *line, const float *values, float *gradients, float *room, int64_t threads);

/* Functions of each value by itself; those by quadrature are told their code, see `curve.c`. */
void bkn_curve(const Line *line, float *values, int64_t threads);
void bkn_pointwise(const Line *line, float *values);
void bkn_pointwise_reversed(const Line *line, const float *values, float *gradients);
