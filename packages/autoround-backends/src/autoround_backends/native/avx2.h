/* Products of a few rows with AVX2: 16 codes and 16 inputs per multiply-add, integers within a group. */
#ifndef AUTOROUND_AVX2_H
#define AUTOROUND_AVX2_H

#include <immintrin.h>

#include "inputs.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE_AVX2 static inline __attribute__((always_inline)) AVX2

INLINE_AVX2 float scale_at(const Weight *w, int64_t index) {
    if (w->scale_dtype == FLOAT32) return ((const float *)w->scale)[index];
    return _cvtsh_ss(((const uint16_t *)w->scale)[index]);
}

INLINE_AVX2 void store_one(void *out, int64_t index, int dtype, float value) {
    if (dtype == FLOAT32) ((float *)out)[index] = value;
    else if (dtype == BFLOAT16) ((uint16_t *)out)[index] = to_bfloat16(value);
    else ((uint16_t *)out)[index] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

/* The eight slots of a block, [half][slot], each 16 codes in lanes of 16 bits. */
INLINE_AVX2 void slots_avx2(const uint8_t *packed, int bits, __m256i slot[2][SLOTS]) {
    if (bits == 8) {
        for (int k = 0; k < SLOTS; k++)
            for (int h = 0; h < 2; h++)
                slot[h][k] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(packed + (2 * k + h) * SLOT)));
        return;
    }
    __m256i half[2];
    half[0] = _mm256_loadu_si256((const __m256i *)packed);
    if (bits == 4) {
        half[1] = _mm256_loadu_si256((const __m256i *)(packed + 32));
    } else if (bits == 2) {
        half[1] = _mm256_srli_epi16(half[0], 8);
    } else {
        const __m256i rest = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(packed + 32)));
        const __m256i first = _mm256_and_si256(_mm256_srli_epi16(half[0], 12), _mm256_set1_epi16(7));
        const __m256i last = _mm256_and_si256(_mm256_srli_epi16(half[0], 4), _mm256_set1_epi16(0x800));
        half[1] = _mm256_or_si256(_mm256_or_si256(first, last), _mm256_slli_epi16(rest, 3));
    }
    const __m256i mask = _mm256_set1_epi16((short)((1 << bits) - 1));
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < SLOTS; k++) slot[h][k] = _mm256_and_si256(_mm256_srli_epi16(half[h], bits * k), mask);
}

/* The sum of one term in integers, less the zero point. s: which sum of the block. */
INLINE_AVX2 __m256i sum_avx2(
    const __m256i slot[2][SLOTS], const int16_t *values, const int32_t *negated, int s, int parts, int sym,
    int32_t zero_point) {
    const int per_half = parts ? SLOTS / parts : SLOTS, start = parts ? (s >> 1) * per_half : 0;
    __m256i sum = _mm256_loadu_si256((const __m256i *)(negated + s * LANES));
    if (!sym) sum = _mm256_mullo_epi32(sum, _mm256_set1_epi32(zero_point));
    for (int h = 0; h < 2; h++) {
        if (parts && h != (s & 1)) continue;
        for (int k = start; k < start + per_half; k++) {
            const __m256i inputs = _mm256_loadu_si256((const __m256i *)(values + (2 * k + h) * SLOT));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(slot[h][k], inputs));
        }
    }
    return sum;
}

/* One output feature for `rows` rows of input. bits, parts and sym are constants where this is inlined. */
INLINE_AVX2 void feature_avx2(
    const Weight *w, const Inputs *x, int64_t first, int64_t n, int rows, int bits, int parts, int sym, float *out) {
    const int64_t blocks = x->blocks, groups = x->groups, each = w->group_length / BLOCK;
    const uint8_t *packed = w->codes + n * blocks * block_bytes(bits);
    const int sums = sums_of(parts);
    __m256 total[MAX_ROWS];
    for (int m = 0; m < rows; m++) total[m] = _mm256_setzero_ps();
    int64_t group = 0, until = each;
    for (int64_t b = 0; b < blocks; b++, packed += block_bytes(bits)) {
        __m256i slot[2][SLOTS];
        _mm_prefetch((const char *)packed + 1024, _MM_HINT_T0);
        slots_avx2(packed, bits, slot);
        if (!parts && b == until && group + 1 < groups) group++, until += each;
        for (int s = 0; s < sums; s++) {
            int64_t g = group;
            if (parts) {
                g = b * 2 * parts + (s & 1) * parts + (s >> 1);
                g = g < groups ? g : groups - 1; /* beyond the end all inputs are zero */
            }
            const float scale = scale_at(w, n * groups + g);
            const int32_t zero_point = sym ? 0 : w->zero_point[n * groups + g];
            for (int m = 0; m < rows; m++) {
                const int64_t at = b * x->rows + first + m;
                const int16_t *values = x->values + at * 2 * BLOCK;
                const int32_t *negated = x->sums + at * 2 * sums * LANES;
                __m256 value = _mm256_cvtepi32_ps(sum_avx2(slot, values, negated, s, parts, sym, zero_point));
                if (x->two[at]) {
                    const __m256i low =
                        sum_avx2(slot, values + BLOCK, negated + sums * LANES, s, parts, sym, zero_point);
                    value = _mm256_fmadd_ps(value, _mm256_set1_ps(1 << LOW_BITS), _mm256_cvtepi32_ps(low));
                }
                total[m] = _mm256_fmadd_ps(value, _mm256_set1_ps(scale * x->steps[at]), total[m]);
            }
        }
    }
    for (int m = 0; m < rows; m++) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(total[m]), _mm256_extractf128_ps(total[m], 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        out[m] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
}

#define FEATURE feature_avx2
#define FEATURES features_avx2
#define MULTIPLY multiply_avx2
#define TARGET AVX2
#include "dispatch.h"
#undef FEATURE
#undef FEATURES
#undef MULTIPLY
#undef TARGET

AVX2 static void inputs_avx2(Inputs *to, const void *x, int dtype, int64_t in_features, int32_t zero_point) {
    make_inputs(to, x, dtype, in_features, zero_point);
}

#endif
