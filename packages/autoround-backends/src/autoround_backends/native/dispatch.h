/* From the numbers of a product to a FEATURE with these numbers as constants. Included once per instruction set. */

#define CASE_SYM(ROWS, BITS, PARTS) \
    if (w->zero_point) FEATURE(w, x, first, n, ROWS, BITS, PARTS, 0, out); \
    else FEATURE(w, x, first, n, ROWS, BITS, PARTS, 1, out);
#define CASE_PARTS(ROWS, BITS) \
    switch (x->parts) { \
        case 0: CASE_SYM(ROWS, BITS, 0) break; \
        case 1: CASE_SYM(ROWS, BITS, 1) break; \
        case 2: CASE_SYM(ROWS, BITS, 2) break; \
        default: CASE_SYM(ROWS, BITS, 4) \
    }
#define CASE_BITS(ROWS) \
    switch (w->bits) { \
        case 2: CASE_PARTS(ROWS, 2) break; \
        case 3: CASE_PARTS(ROWS, 3) break; \
        case 4: CASE_PARTS(ROWS, 4) break; \
        default: CASE_PARTS(ROWS, 8) \
    }

/* out: [rows] for output feature n and the rows of input from `first` on; rows is 1 or at most MAX_ROWS. */
TARGET static void FEATURES(const Weight *w, const Inputs *x, int64_t first, int64_t n, int rows, float *out) {
    if (rows == 1) { CASE_BITS(1) } else { CASE_BITS(rows) }
}

#undef CASE_SYM
#undef CASE_PARTS
#undef CASE_BITS
