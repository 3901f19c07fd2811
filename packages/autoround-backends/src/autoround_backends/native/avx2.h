/* Products of a few rows with AVX2: 16 codes and 16 inputs per multiply-add, integers within a group. */
#ifndef AUTOROUND_AVX2_H
#define AUTOROUND_AVX2_H

#include <immintrin.h>

#include "inputs.h"

enum { AHEAD = 2048 }; /* bytes */

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

/* A block some blocks ahead. The processor's own prefetching falls behind: without this half the speed was measured. */
INLINE_AVX2 void prefetch(const uint8_t *packed, int64_t size) {
    _mm_prefetch((const char *)packed + AHEAD, _MM_HINT_T0);
    if (size > 64) _mm_prefetch((const char *)packed + AHEAD + 64, _MM_HINT_T0);
}

/* The halves of a block of 2, 3 or 4 bits: four slots in lanes of 16 bits. */
INLINE_AVX2 void halves_avx2(const uint8_t *packed, int bits, __m256i half[2]) {
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
}

/* Slot k of half h: 16 codes in lanes of 16 bits. */
INLINE_AVX2 __m256i slot_avx2(const uint8_t *packed, int bits, const __m256i half[2], int h, int k) {
    if (bits == 8) return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(packed + (2 * k + h) * SLOT)));
    return _mm256_and_si256(_mm256_srli_epi16(half[h], bits * k), _mm256_set1_epi16((short)((1 << bits) - 1)));
}

/* The eight slots of a block, [half][slot]. */
INLINE_AVX2 void slots_avx2(const uint8_t *packed, int bits, __m256i slot[2][SLOTS]) {
    __m256i half[2];
    if (bits != 8) halves_avx2(packed, bits, half);
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < SLOTS; k++) slot[h][k] = slot_avx2(packed, bits, half, h, k);
}

INLINE_AVX2 float add_eight(__m256 total) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
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
        prefetch(packed, block_bytes(bits));
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
    for (int m = 0; m < rows; m++) out[m] = add_eight(total[m]);
}

/* scale * step of blocks [first, first + count), for one row of input and groups of whole blocks. */
INLINE_AVX2 void factors_avx2(const Weight *w, const Inputs *x, int64_t n, int64_t first, int64_t count, float *out) {
    const int64_t each = w->group_length / BLOCK, last = x->groups - 1, start = n * x->groups;
    int64_t i = 0;
    if (each == 1 && w->scale_dtype == FLOAT16)
        for (; i + LANES <= count; i += LANES) {
            const uint16_t *from = (const uint16_t *)w->scale + start + first + i;
            const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
            _mm256_storeu_ps(out + i, _mm256_mul_ps(scale, _mm256_loadu_ps(x->steps + first + i)));
        }
    for (; i < count; i++) {
        const int64_t g = each == 1 || !last ? first + i : (first + i) / each;
        out[i] = scale_at(w, start + (g < last ? g : last)) * x->steps[first + i];
    }
}

/* Two output features for one row of one-term inputs, groups of whole blocks: the case of single tokens, in which the
 * inputs, loaded once, serve both. */
INLINE_AVX2 void pair_avx2(const Weight *w, const Inputs *x, int64_t n, int bits, int sym, float *out) {
    const int64_t blocks = x->blocks, size = block_bytes(bits), each = w->group_length / BLOCK, last = x->groups - 1;
    const uint8_t *packed[2] = {w->codes + n * blocks * size, w->codes + (n + 1) * blocks * size};
    __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    float factor[2][PIECE];
    for (int64_t first = 0; first < blocks; first += PIECE) {
        const int64_t count = blocks - first < PIECE ? blocks - first : PIECE;
        for (int f = 0; f < 2; f++) factors_avx2(w, x, n + f, first, count, factor[f]);
        const int16_t *values = x->values + first * 2 * BLOCK;
        const int32_t *negated = x->sums + first * 2 * LANES;
        for (int64_t i = 0; i < count; i++, values += 2 * BLOCK, negated += 2 * LANES) {
            __m256i half[2][2], sum[2];
            for (int f = 0; f < 2; f++) {
                prefetch(packed[f], size);
                if (bits != 8) halves_avx2(packed[f], bits, half[f]);
                sum[f] = _mm256_loadu_si256((const __m256i *)negated);
                if (!sym) {
                    const int64_t g = each == 1 || !last ? first + i : (first + i) / each;
                    const int32_t zero_point = w->zero_point[(n + f) * x->groups + (g < last ? g : last)];
                    sum[f] = _mm256_mullo_epi32(sum[f], _mm256_set1_epi32(zero_point));
                }
            }
            for (int h = 0; h < 2; h++)
                for (int k = 0; k < SLOTS; k++) {
                    const __m256i inputs = _mm256_loadu_si256((const __m256i *)(values + (2 * k + h) * SLOT));
                    for (int f = 0; f < 2; f++) {
                        const __m256i codes = slot_avx2(packed[f], bits, half[f], h, k);
                        sum[f] = _mm256_add_epi32(sum[f], _mm256_madd_epi16(codes, inputs));
                    }
                }
            for (int f = 0; f < 2; f++) {
                total[f] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[f]), _mm256_set1_ps(factor[f][i]), total[f]);
                packed[f] += size;
            }
        }
    }
    for (int f = 0; f < 2; f++) out[f] = add_eight(total[f]);
}

#define FEATURE feature_avx2
#define FEATURES features_avx2
#define PAIR pair_avx2
#define MULTIPLY multiply_avx2
#define TARGET AVX2
#include "dispatch.h"
#undef FEATURE
#undef FEATURES
#undef PAIR
#undef MULTIPLY
#undef TARGET

AVX2 static void inputs_avx2(Inputs *to, const void *x, int dtype, int64_t in_features, int32_t zero_point) {
    make_inputs(to, x, dtype, in_features, zero_point);
}

#endif
