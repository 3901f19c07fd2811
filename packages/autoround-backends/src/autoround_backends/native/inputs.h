/* Inputs as integers.
 *
 * The 128 inputs of a block share a power of two, its step: x = step (high 2**14 + low) with two terms, x = step high
 * with one. Two terms hold 28 bits below the greatest input, more than the 24 of a float32. One term holds 15; it
 * serves inputs of 16 bits whose greatest is at most 16 times their mean magnitude, so that what it loses of each,
 * 2**-12 of the mean, is less than the rounding of the output to 16 bits. A block with an outlier takes two. So all
 * products and their sums within a block are exact integers, whatever the order.
 *
 * For each block and row: int16 [2][128], slots in the order of 8-bit codes; the step; whether there are two terms;
 * and the negated sums of the inputs, laid out as the accumulators of a kernel are (pairs of neighbours in int32
 * lanes), which make a zero point one multiplication.
 */
#ifndef AUTOROUND_INPUTS_H
#define AUTOROUND_INPUTS_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "blocks.h"

enum { LOW_BITS = 14, HIGH_BITS = 15, LANES = 8, OUTLIER = 16, PIECE = 64 };

typedef struct {
    int64_t rows, blocks, groups;
    int parts; /* groups that a half has: 1 or 2; 0 = both halves belong to one group */
    int16_t *values; /* [blocks, rows, 2, 128] */
    int32_t *sums;   /* [blocks, rows, 2, sums_of(parts), LANES] */
    float *steps;    /* [blocks, rows] */
    uint8_t *two;    /* [blocks, rows] */
    int outliers;    /* whether any block has two terms */
} Inputs;

typedef struct {
    const Weight *weight;
    const Inputs *inputs;
    const float *bias; /* [out] or NULL */
    int dtype;         /* of out: [rows, out] */
    void *out;
} Product;

static inline int sums_of(int parts) { return parts ? 2 * parts : 1; }

/* Which of the sums of a block slot k of half h counts to: halves are next to each other. */
static inline int sum_of(int parts, int h, int k) { return parts ? 2 * (k * parts / SLOTS) + h : 0; }

static inline __attribute__((always_inline)) void read_block(
    const void *row, int dtype, int64_t start, int64_t count, float *x) {
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < count; i++) x[i] = ((const float *)row)[start + i];
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) x[i] = from_bfloat16(((const uint16_t *)row)[start + i]);
    else
        for (int64_t i = 0; i < count; i++) x[i] = (float)((const _Float16 *)row)[start + i];
    for (int64_t i = count; i < BLOCK; i++) x[i] = 0;
}

static inline __attribute__((always_inline)) void make_inputs(
    Inputs *to, const void *x, int dtype, int64_t in_features, int32_t zero_point) {
    const int sums = sums_of(to->parts);
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    float block[BLOCK];
    int32_t whole[BLOCK];
    for (int64_t m = 0; m < to->rows; m++)
        for (int64_t b = 0; b < to->blocks; b++) {
            const int64_t at = b * to->rows + m, left = in_features - b * BLOCK, count = left < BLOCK ? left : BLOCK;
            read_block((const uint8_t *)x + m * in_features * size, dtype, b * BLOCK, count, block);
            float greatest = 0, total = 0;
            int finite = 1;
            for (int i = 0; i < BLOCK; i++) {
                const float magnitude = fabsf(block[i]);
                finite &= magnitude <= FLT_MAX;
                greatest = magnitude > greatest ? magnitude : greatest;
                total += magnitude;
            }
            const int two = dtype == FLOAT32 || greatest * (float)count > OUTLIER * total;
            const int top = two ? 2 * LOW_BITS : HIGH_BITS;
            int exponent = 0;
            frexpf(finite ? greatest : 1, &exponent); /* greatest < 2**exponent */
            if (exponent < top - 126) exponent = top - 126; /* a step is at least 2**-126 */
            const float factor = ldexpf(1, top - exponent);
            to->steps[at] = finite ? ldexpf(1, exponent - top) : NAN;
            to->two[at] = (uint8_t)two;
            to->outliers |= two;
            for (int i = 0; i < BLOCK; i++) whole[i] = finite ? (int32_t)rintf(block[i] * factor) : 0;
            int16_t *values = to->values + at * 2 * BLOCK;
            int32_t *sum = to->sums + at * 2 * sums * LANES;
            memset(sum, 0, sizeof(int32_t) * 2 * (size_t)sums * LANES);
            for (int h = 0; h < 2; h++)
                for (int k = 0; k < SLOTS; k++) {
                    const int32_t *from = whole + HALF * h + SLOT * k;
                    int16_t *high = values + (2 * k + h) * SLOT, *low = high + BLOCK;
                    int32_t *negated = sum + sum_of(to->parts, h, k) * LANES;
                    if (two)
                        for (int i = 0; i < SLOT; i++) {
                            high[i] = (int16_t)((from[i] + (1 << (LOW_BITS - 1))) >> LOW_BITS);
                            low[i] = (int16_t)(from[i] - high[i] * (1 << LOW_BITS));
                        }
                    else
                        for (int i = 0; i < SLOT; i++) high[i] = (int16_t)from[i];
                    for (int i = 0; i < LANES; i++) negated[i] -= zero_point * (high[2 * i] + high[2 * i + 1]);
                    if (two)
                        for (int i = 0; i < LANES; i++)
                            negated[sums * LANES + i] -= zero_point * (low[2 * i] + low[2 * i + 1]);
                }
        }
}

#endif
