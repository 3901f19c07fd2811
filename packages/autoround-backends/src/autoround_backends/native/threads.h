/* Work shared among the threads that torch has already.
 *
 * A second pool of threads beside torch's would fight it for the cores: OpenMP's idle threads spin for a while. So the
 * entry of torch's own libgomp is looked up among the symbols of the process; where there is none (another OpenMP), the
 * caller does all the work. Threads take pieces from a counter, so that a slow core delays only its last piece.
 */
#ifndef AUTOROUND_THREADS_H
#define AUTOROUND_THREADS_H

#include <dlfcn.h>
#include <stdint.h>

enum { PIECES = 2 }; /* for each thread: larger ones are read faster, more balance better */

typedef void (*Piece)(void *work, int64_t start, int64_t stop);

typedef struct {
    Piece piece;
    void *work;
    int64_t count, step, next;
} Share;

static void take_pieces(void *pointer) {
    Share *share = pointer;
    for (;;) {
        const int64_t start = __atomic_fetch_add(&share->next, share->step, __ATOMIC_RELAXED);
        if (start >= share->count) return;
        const int64_t stop = start + share->step;
        share->piece(share->work, start, stop < share->count ? stop : share->count);
    }
}

static void in_parallel(Piece piece, void *work, int64_t count, int threads) {
    typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
    static Parallel parallel;
    static int looked;
    if (!looked) parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel"), looked = 1;
    const int64_t step = count / (threads * PIECES);
    Share share = {piece, work, count, step > 1 ? step : 1, 0};
    if (parallel && threads > 1 && count > 1) parallel(take_pieces, &share, (unsigned)threads, 0);
    else take_pieces(&share);
}

#endif
