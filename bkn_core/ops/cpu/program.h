/* A program of instructions that push mean and variance per channel from one normalization layer to the next, and its
   reverse.

   The rules of `graph/rules` write them; `filter/propagate.py` says what each does. A value lives in an arena of floats,
   its mean and its variance at two offsets; gradients live in a second arena at the same offsets. */

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
    int64_t accumulates;            /* bit i: the gradient of parameter i holds the part of a later instruction already */
    const void *parameters[4];      /* NULL where there is none; the last may be numbers that the instruction is told */
    float *gradients[4];            /* NULL where none is wanted */
    double x, y;                    /* numbers of an affine map; x is eps of a refinement, the variance's factor of an
                                       average, the number of a maximum, whose y says whether its values are rectified,
                                       and whether a gain is learned: the sigmoid of its parameter;
                                       bounds of a clipped value, the slope of a leaky rectifier, phases of a stride */
} Instruction;

/* Reads and writes W once per instruction and direction; `columns` are the messages laid out once per tap, and
   `scratch` holds as much. */
void bkn_convolution(const Instruction *op, float *values, float *scratch, int64_t threads);
void bkn_convolution_reversed(const Instruction *op, const float *values, float *gradients, float *scratch, int64_t threads);
void bkn_patches(const Instruction *op, float *values, float *scratch);
void bkn_patches_reversed(const Instruction *op, const float *values, const float *gradients, float *scratch);

/* Transposed convolutions are convolutions with the directions exchanged. The instruction is told the phase of each tap. */
void bkn_transposed(const Instruction *op, float *values, float *scratch, int64_t threads);
void bkn_transposed_reversed(const Instruction *op, const float *values, float *gradients, float *scratch, int64_t threads);

/* Functions of each value by itself; those by quadrature are told their code, see `curve.c`. */
void bkn_curve(const Instruction *op, float *values, int64_t threads);
void bkn_pointwise(const Instruction *op, float *values);
void bkn_pointwise_reversed(const Instruction *op, const float *values, float *gradients);
