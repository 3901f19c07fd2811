/* Products of a few rows with a matrix of 16-bit floats, in float32: as fast as the matrix can be read. */
#ifndef AUTOROUND_DENSE_H
#define AUTOROUND_DENSE_H

#include "avx2.h"
#include "threads.h"

enum { STEP = 8, CHAINS = 4 }; /* numbers in a register; sums that do not wait for each other */

typedef struct {
    int64_t out_features, in_features, rows;
    const uint16_t *weight; /* [out, in] */
    const float *x;         /* [rows, in] */
    const float *bias;      /* [out] or NULL */
    void *out;              /* [rows, out] of `dtype` */
    int dtype;              /* of weight and out: BFLOAT16 or FLOAT16 */
} Dense;

INLINE_AVX2 __m256 read_eight(const uint16_t *from, int dtype) {
    const __m128i eight = _mm_loadu_si128((const __m128i *)from);
    if (dtype == FLOAT16) return _mm256_cvtph_ps(eight);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

INLINE_AVX2 float read_one(uint16_t value, int dtype) {
    return dtype == FLOAT16 ? _cvtsh_ss(value) : from_bfloat16(value);
}

/* Output feature n for `rows` rows of input from x on; chains: CHAINS for one row, 1 for several. */
INLINE_AVX2 void dense_feature(
    const Dense *d, const float *x, int64_t n, int rows, int chains, int dtype, float *out) {
    const int64_t count = d->in_features, stride = (int64_t)STEP * chains;
    const uint16_t *weight = d->weight + n * count;
    __m256 total[MAX_ROWS][CHAINS];
    for (int m = 0; m < rows; m++)
        for (int c = 0; c < chains; c++) total[m][c] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + stride <= count; i += stride) {
        _mm_prefetch((const char *)(weight + i) + 2048, _MM_HINT_T0);
        for (int c = 0; c < chains; c++) {
            const __m256 w = read_eight(weight + i + STEP * c, dtype);
            for (int m = 0; m < rows; m++)
                total[m][c] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + m * count + i + STEP * c), total[m][c]);
        }
    }
    for (int m = 0; m < rows; m++) {
        for (int c = 1; c < chains; c++) total[m][0] = _mm256_add_ps(total[m][0], total[m][c]);
        out[m] = add_eight(total[m][0]);
        for (int64_t j = i; j < count; j++) out[m] += read_one(weight[j], dtype) * x[m * count + j];
    }
}

AVX2 static void dense_features(void *pointer, int64_t start, int64_t stop) {
    const Dense *d = pointer;
    float sums[MAX_ROWS];
    for (int64_t n = start; n < stop; n++)
        for (int64_t first = 0; first < d->rows; first += MAX_ROWS) {
            const int64_t left = d->rows - first;
            const int rows = left < MAX_ROWS ? (int)left : MAX_ROWS;
            const float *x = d->x + first * d->in_features;
            if (d->dtype == BFLOAT16 && rows == 1) dense_feature(d, x, n, 1, CHAINS, BFLOAT16, sums);
            else if (d->dtype == BFLOAT16) dense_feature(d, x, n, rows, 1, BFLOAT16, sums);
            else if (rows == 1) dense_feature(d, x, n, 1, CHAINS, FLOAT16, sums);
            else dense_feature(d, x, n, rows, 1, FLOAT16, sums);
            for (int m = 0; m < rows; m++)
                store_one(d->out, (first + m) * d->out_features + n, d->dtype, sums[m] + (d->bias ? d->bias[n] : 0));
        }
}

#endif
