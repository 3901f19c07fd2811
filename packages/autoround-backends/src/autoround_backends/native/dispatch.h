/* From the numbers of a product to loops with these numbers as constants. Included once per instruction set. */

/* Output features [start, stop), MAX_ROWS rows of input at a time. */
static inline __attribute__((always_inline)) TARGET void FEATURES(
    const Product *p, int64_t start, int64_t stop, int bits, int parts, int sym) {
    const Weight *w = p->weight;
    float sums[MAX_ROWS];
#ifdef PAIR
    if (p->inputs->rows == 1 && parts == 0 && !p->inputs->outliers)
        for (; start + 2 <= stop; start += 2) {
            PAIR(w, p->inputs, start, bits, sym, sums);
            for (int f = 0; f < 2; f++)
                store_one(p->out, start + f, p->dtype, sums[f] + (p->bias ? p->bias[start + f] : 0));
        }
#endif
    for (int64_t n = start; n < stop; n++)
        for (int64_t first = 0; first < p->inputs->rows; first += MAX_ROWS) {
            const int64_t left = p->inputs->rows - first;
            const int rows = left < MAX_ROWS ? (int)left : MAX_ROWS;
            if (rows == 1) FEATURE(w, p->inputs, first, n, 1, bits, parts, sym, sums);
            else FEATURE(w, p->inputs, first, n, rows, bits, parts, sym, sums);
            for (int m = 0; m < rows; m++)
                store_one(p->out, (first + m) * w->out_features + n, p->dtype, sums[m] + (p->bias ? p->bias[n] : 0));
        }
}

#define CASE_SYM(BITS, PARTS) \
    if (p->weight->zero_point) FEATURES(p, start, stop, BITS, PARTS, 0); \
    else FEATURES(p, start, stop, BITS, PARTS, 1);
#define CASE_PARTS(BITS) \
    switch (p->inputs->parts) { \
        case 0: CASE_SYM(BITS, 0) break; \
        case 1: CASE_SYM(BITS, 1) break; \
        default: CASE_SYM(BITS, 2) \
    }

TARGET static void MULTIPLY(void *pointer, int64_t start, int64_t stop) {
    const Product *p = pointer;
    switch (p->weight->bits) {
        case 2: CASE_PARTS(2) break;
        case 3: CASE_PARTS(3) break;
        case 4: CASE_PARTS(4) break;
        default: CASE_PARTS(8)
    }
}

#undef CASE_SYM
#undef CASE_PARTS
