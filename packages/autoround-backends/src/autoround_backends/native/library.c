/* Products of a few rows on CPUs, with group-wise integers and with 16-bit floats. Called through ctypes. */

#include <stdlib.h>

#include "avx2.h"
#include "avx512.h"
#include "dense.h"
#include "threads.h"

enum { NONE = 0, USE_AVX2 = 1, USE_AVX512 = 2 };

/* The best instruction set of this processor that there are kernels for: 0, 1 or 2. */
int autoround_instructions(void) {
    __builtin_cpu_init();
    const int avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const int avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512vnni");
    return avx2 ? (avx512 ? USE_AVX512 : USE_AVX2) : NONE;
}

int64_t autoround_packed_bytes(int64_t out_features, int64_t in_features, int bits) {
    return out_features * ceil_div(in_features, BLOCK) * block_bytes(bits);
}

/* --- packing ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *codes;
    int64_t in_features;
    int bits;
    uint8_t *packed;
} Packing;

static void pack_rows(void *pointer, int64_t start, int64_t stop) {
    const Packing *p = pointer;
    uint8_t last[BLOCK];
    const int64_t blocks = ceil_div(p->in_features, BLOCK);
    for (int64_t n = start; n < stop; n++)
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t *from = p->codes + n * p->in_features + b * BLOCK;
            const int64_t left = p->in_features - b * BLOCK;
            if (left < BLOCK) {
                memset(last, 0, BLOCK);
                memcpy(last, from, (size_t)left);
                from = last;
            }
            uint8_t *to = p->packed + (n * blocks + b) * block_bytes(p->bits);
            switch (p->bits) {
                case 2: pack_block(from, 2, to); break;
                case 3: pack_block(from, 3, to); break;
                case 4: pack_block(from, 4, to); break;
                default: pack_block(from, 8, to);
            }
        }
}

/* codes: uint8 [out, in]; packed: autoround_packed_bytes. */
void autoround_pack(
    const uint8_t *codes, int64_t out_features, int64_t in_features, int bits, uint8_t *packed, int threads) {
    Packing packing = {codes, in_features, bits, packed};
    in_parallel(pack_rows, &packing, out_features, threads);
}

/* --- dequantizing ------------------------------------------------------------------------------------------------ */

typedef struct {
    const Weight *weight;
    int64_t first;
    int dtype;
    void *out;
} Dequantizing;

/* A block as float32 [128]. */
INLINE_AVX2 void dequantize_block(const Weight *w, int64_t n, int64_t b, int bits, float *out) {
    const int64_t groups = groups_of(w);
    __m256i slot[2][SLOTS];
    slots_avx2(w->codes + (n * blocks_of(w) + b) * block_bytes(bits), bits, slot);
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < SLOTS; k++) {
            const int at = HALF * h + SLOT * k;
            const int64_t group = (b * BLOCK + at) / w->group_length;
            const int64_t g = n * groups + (group < groups ? group : groups - 1);
            const __m256 scale = _mm256_set1_ps(scale_at(w, g));
            const int zero_point = w->zero_point ? w->zero_point[g] : 1 << (bits - 1);
            const __m256i code = _mm256_sub_epi16(slot[h][k], _mm256_set1_epi16((short)zero_point));
            const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(code));
            const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(code, 1));
            _mm256_storeu_ps(out + at, _mm256_mul_ps(_mm256_cvtepi32_ps(low), scale));
            _mm256_storeu_ps(out + at + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(high), scale));
        }
}

INLINE_AVX2 void store_block(const float *block, int64_t count, int dtype, void *row, int64_t start) {
    uint16_t *out = (uint16_t *)row + start;
    if (dtype == FLOAT32) memcpy((float *)row + start, block, sizeof(float) * (size_t)count);
    else if (dtype == BFLOAT16) for (int64_t i = 0; i < count; i++) out[i] = to_bfloat16(block[i]);
    else for (int64_t i = 0; i < count; i++) out[i] = _cvtss_sh(block[i], _MM_FROUND_TO_NEAREST_INT);
}

AVX2 static void dequantize_rows(void *pointer, int64_t start, int64_t stop) {
    const Dequantizing *d = pointer;
    const Weight *w = d->weight;
    float block[BLOCK];
    for (int64_t n = start; n < stop; n++) {
        uint8_t *row = (uint8_t *)d->out + n * w->in_features * (d->dtype == FLOAT32 ? 4 : 2);
        for (int64_t b = 0; b < blocks_of(w); b++) {
            const int64_t left = w->in_features - b * BLOCK;
            switch (w->bits) {
                case 2: dequantize_block(w, d->first + n, b, 2, block); break;
                case 3: dequantize_block(w, d->first + n, b, 3, block); break;
                case 4: dequantize_block(w, d->first + n, b, 4, block); break;
                default: dequantize_block(w, d->first + n, b, 8, block);
            }
            store_block(block, left < BLOCK ? left : BLOCK, d->dtype, row, b * BLOCK);
        }
    }
}

/* Output features [first, first + count) as out [count, in]. */
void autoround_dequantize(
    int64_t out_features, int64_t in_features, int64_t group_length, int bits, int scale_dtype, const uint8_t *codes,
    const void *scale, const uint8_t *zero_point, int64_t first, int64_t count, int dtype, void *out, int threads) {
    const Weight weight = {out_features, in_features, group_length, bits, scale_dtype, codes, scale, zero_point};
    Dequantizing dequantizing = {&weight, first, dtype, out};
    in_parallel(dequantize_rows, &dequantizing, count, threads);
}

/* --- products ---------------------------------------------------------------------------------------------------- */

static int parts_of(const Weight *w) {
    if (w->group_length >= w->in_features || w->group_length % BLOCK == 0) return 0;
    return (int)(HALF / w->group_length);
}

/* x: [rows, in], out: [rows, out], both of `dtype`; bias: [out] or NULL. Returns 0, or 1 where memory is short. */
int autoround_multiply(
    int64_t out_features, int64_t in_features, int64_t group_length, int bits, int scale_dtype, const uint8_t *codes,
    const void *scale, const uint8_t *zero_point, const void *x, int64_t rows, int dtype, const float *bias, void *out,
    int instructions, int threads) {
    const Weight w = {out_features, in_features, group_length, bits, scale_dtype, codes, scale, zero_point};
    const Weight *weight = &w;
    Inputs inputs = {
        .rows = rows, .blocks = blocks_of(weight), .groups = groups_of(weight), .parts = parts_of(weight)};
    const size_t cells = (size_t)(rows * inputs.blocks);
    const size_t values = sizeof(int16_t) * 2 * BLOCK * cells;
    const size_t sums = sizeof(int32_t) * 2 * LANES * (size_t)sums_of(inputs.parts) * cells;
    uint8_t *memory = malloc(values + sums + (sizeof(float) + 1) * cells);
    if (!memory) return 1;
    inputs.values = (int16_t *)memory;
    inputs.sums = (int32_t *)(memory + values);
    inputs.steps = (float *)(memory + values + sums);
    inputs.two = memory + values + sums + sizeof(float) * cells;
    inputs_avx2(&inputs, x, dtype, weight->in_features, weight->zero_point ? 1 : 1 << (weight->bits - 1));
    Product product = {weight, &inputs, bias, dtype, out};
    const Piece piece = instructions == USE_AVX512 ? multiply_avx512 : multiply_avx2;
    in_parallel(piece, &product, weight->out_features, threads);
    free(memory);
    return 0;
}

/* The same for weights of 16-bit floats [out, in]; x: float32 [rows, in]; out: [rows, out] of the weights' dtype. */
void autoround_multiply_dense(
    int64_t out_features, int64_t in_features, const uint16_t *weight, int dtype, const float *x, int64_t rows,
    const float *bias, void *out, int threads) {
    Dense dense = {out_features, in_features, rows, weight, x, bias, out, dtype};
    in_parallel(dense_features, &dense, out_features, threads);
}
