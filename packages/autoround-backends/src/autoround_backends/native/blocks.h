/* The private layout of codes, and the description of a product.
 *
 * A row of a weight is cut into blocks of 128 codes, the last one filled up with zeros. A block has two halves of
 * four slots of 16 codes: slot k of half h holds codes 64 h + 16 k + i, i = 0..15. With 2, 3 and 4 bits a half is
 * 16 lanes of 16 bits, code i of slot k in bits [bits k, bits (k + 1)) of lane i; a vector shift and a mask give 16
 * codes ready for the 16-bit multiply-add. In memory:
 *
 *   2 bits   32 bytes: half 1 lies in the upper bytes of the lanes of half 0
 *   3 bits   48 bytes: the 12 bits of half 1 are bits 12..14 (slot 0) and 15 (top bit of slot 3) of the lanes of
 *            half 0, and 16 bytes with the other eight
 *   4 bits   64 bytes: half 0, half 1
 *   8 bits  128 bytes: slots in the order (0, half 0), (0, half 1), (1, half 0), ...
 *
 * Inputs become integers, see inputs.h; their slots are in the order that 8-bit codes have.
 */
#ifndef AUTOROUND_BLOCKS_H
#define AUTOROUND_BLOCKS_H

#include <stdint.h>

enum { BLOCK = 128, HALF = 64, SLOT = 16, SLOTS = 4 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { MAX_ROWS = 8 }; /* rows of input that share one unpacking */

typedef struct {
    int64_t out_features, in_features, group_length; /* group_length: 32, 64, a multiple of 128, or in_features */
    int32_t bits, scale_dtype;                       /* scale_dtype: FLOAT16 or FLOAT32 */
    const uint8_t *codes;                            /* [out, blocks, block_bytes(bits)] */
    const void *scale;                               /* [out, groups] */
    const uint8_t *zero_point;                       /* [out, groups], NULL = 2**(bits - 1) everywhere */
} Weight;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t block_bytes(int bits) { return BLOCK / 8 * bits; }
static inline int64_t blocks_of(const Weight *w) { return ceil_div(w->in_features, BLOCK); }
static inline int64_t groups_of(const Weight *w) { return ceil_div(w->in_features, w->group_length); }

static inline float from_bfloat16(uint16_t half) {
    union { uint32_t i; float f; } u = {(uint32_t)half << 16};
    return u.f;
}

/* to the nearest, ties to even; NaN stays NaN */
static inline uint16_t to_bfloat16(float value) {
    union { float f; uint32_t i; } u = {value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16);
}

static inline void pack_block(const uint8_t *codes, int bits, uint8_t *out) {
    if (bits == 8) {
        for (int k = 0; k < SLOTS; k++)
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < SLOT; i++) out[(2 * k + h) * SLOT + i] = codes[HALF * h + SLOT * k + i];
        return;
    }
    uint16_t half[2][SLOT] = {{0}};
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < SLOTS; k++)
            for (int i = 0; i < SLOT; i++) half[h][i] |= (uint16_t)(codes[HALF * h + SLOT * k + i] << (bits * k));
    for (int i = 0; i < SLOT; i++) {
        uint16_t *lanes = (uint16_t *)out;
        if (bits == 4) {
            lanes[i] = half[0][i], lanes[SLOT + i] = half[1][i];
        } else if (bits == 2) {
            lanes[i] = (uint16_t)(half[0][i] | half[1][i] << 8);
        } else {
            lanes[i] = (uint16_t)(half[0][i] | (half[1][i] & 7) << 12 | (half[1][i] & 0x800) << 4);
            out[2 * SLOT + i] = (uint8_t)(half[1][i] >> 3);
        }
    }
}

static inline void unpack_block(const uint8_t *packed, int bits, uint8_t *codes) {
    if (bits == 8) {
        for (int k = 0; k < SLOTS; k++)
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < SLOT; i++) codes[HALF * h + SLOT * k + i] = packed[(2 * k + h) * SLOT + i];
        return;
    }
    const uint16_t *lanes = (const uint16_t *)packed;
    uint16_t half[2][SLOT];
    for (int i = 0; i < SLOT; i++) {
        half[0][i] = lanes[i];
        if (bits == 4) half[1][i] = lanes[SLOT + i];
        else if (bits == 2) half[1][i] = lanes[i] >> 8;
        else half[1][i] = (uint16_t)((lanes[i] >> 12 & 7) | packed[2 * SLOT + i] << 3 | (lanes[i] >> 4 & 0x800));
    }
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < SLOTS; k++)
            for (int i = 0; i < SLOT; i++)
                codes[HALF * h + SLOT * k + i] = (uint8_t)(half[h][i] >> (bits * k) & ((1 << bits) - 1));
}

#endif
