/* The same with AVX-512 and VNNI: a register holds slot k of both halves, a multiply-add also adds. */
#ifndef AUTOROUND_AVX512_H
#define AUTOROUND_AVX512_H

#include "avx2.h"

#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE_AVX512 static inline __attribute__((always_inline)) AVX512

INLINE_AVX512 __m512i join_avx512(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

INLINE_AVX512 void slots_avx512(const uint8_t *packed, int bits, __m512i slot[SLOTS]) {
    if (bits == 8) {
        for (int k = 0; k < SLOTS; k++)
            slot[k] = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(packed + 2 * k * SLOT)));
        return;
    }
    __m512i both;
    if (bits == 4) {
        both = _mm512_loadu_si512(packed);
    } else {
        const __m256i low = _mm256_loadu_si256((const __m256i *)packed);
        __m256i high = _mm256_srli_epi16(low, 8);
        if (bits == 3) {
            const __m256i rest = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(packed + 32)));
            const __m256i first = _mm256_and_si256(_mm256_srli_epi16(low, 12), _mm256_set1_epi16(7));
            const __m256i last = _mm256_and_si256(_mm256_srli_epi16(low, 4), _mm256_set1_epi16(0x800));
            high = _mm256_or_si256(_mm256_or_si256(first, last), _mm256_slli_epi16(rest, 3));
        }
        both = join_avx512(low, high);
    }
    const __m512i mask = _mm512_set1_epi16((short)((1 << bits) - 1));
    for (int k = 0; k < SLOTS; k++) slot[k] = _mm512_and_si512(_mm512_srli_epi16(both, (unsigned)(bits * k)), mask);
}

INLINE_AVX512 __m512i sum_avx512(
    const __m512i slot[SLOTS], const int16_t *values, const int32_t *negated, int r, int parts, int sym,
    __m512i zero_point) {
    const int in_run = parts ? SLOTS / parts : SLOTS;
    __m512i sum = parts ? _mm512_loadu_si512(negated + 2 * r * LANES)
                        : _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)negated));
    if (!sym) sum = _mm512_mullo_epi32(sum, zero_point);
    for (int k = r * in_run; k < (r + 1) * in_run; k++)
        sum = _mm512_dpwssd_epi32(sum, slot[k], _mm512_loadu_si512(values + 2 * k * SLOT));
    return sum;
}

INLINE_AVX512 void feature_avx512(
    const Weight *w, const Inputs *x, int64_t first, int64_t n, int rows, int bits, int parts, int sym, float *out) {
    const int64_t blocks = x->blocks, groups = x->groups, each = w->group_length / BLOCK;
    const uint8_t *packed = w->codes + n * blocks * block_bytes(bits);
    const int sums = sums_of(parts), runs = parts ? parts : 1;
    __m512 total[MAX_ROWS];
    for (int m = 0; m < rows; m++) total[m] = _mm512_setzero_ps();
    int64_t group = 0, until = each;
    for (int64_t b = 0; b < blocks; b++, packed += block_bytes(bits)) {
        __m512i slot[SLOTS];
        prefetch(packed, block_bytes(bits));
        slots_avx512(packed, bits, slot);
        if (!parts && b == until && group + 1 < groups) group++, until += each;
        for (int r = 0; r < runs; r++) {
            int64_t low = group, high = group;
            if (parts) { /* beyond the end all inputs are zero */
                low = b * 2 * parts + r, high = low + parts;
                low = low < groups ? low : groups - 1, high = high < groups ? high : groups - 1;
            }
            const float scale[2] = {scale_at(w, n * groups + low), scale_at(w, n * groups + high)};
            const int32_t zero[2] = {
                sym ? 0 : w->zero_point[n * groups + low], sym ? 0 : w->zero_point[n * groups + high]};
            const __m512i zero_point = join_avx512(_mm256_set1_epi32(zero[0]), _mm256_set1_epi32(zero[1]));
            for (int m = 0; m < rows; m++) {
                const int64_t at = b * x->rows + first + m;
                const int16_t *values = x->values + at * 2 * BLOCK;
                const int32_t *negated = x->sums + at * 2 * sums * LANES;
                __m512 value = _mm512_cvtepi32_ps(sum_avx512(slot, values, negated, r, parts, sym, zero_point));
                if (x->two[at]) {
                    const __m512i lower =
                        sum_avx512(slot, values + BLOCK, negated + sums * LANES, r, parts, sym, zero_point);
                    value = _mm512_fmadd_ps(value, _mm512_set1_ps(1 << LOW_BITS), _mm512_cvtepi32_ps(lower));
                }
                const float step = x->steps[at];
                const __m512 factor = parts ? _mm512_castsi512_ps(join_avx512(
                                                  _mm256_castps_si256(_mm256_set1_ps(scale[0] * step)),
                                                  _mm256_castps_si256(_mm256_set1_ps(scale[1] * step))))
                                            : _mm512_set1_ps(scale[0] * step);
                total[m] = _mm512_fmadd_ps(value, factor, total[m]);
            }
        }
    }
    for (int m = 0; m < rows; m++) out[m] = _mm512_reduce_add_ps(total[m]);
}

#define FEATURE feature_avx512
#define FEATURES features_avx512
#define MULTIPLY multiply_avx512
#define TARGET AVX512
#include "dispatch.h"
#undef FEATURE
#undef FEATURES
#undef MULTIPLY
#undef TARGET

#endif
