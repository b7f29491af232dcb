/* What the kernels share: vectorization, and PyTorch's own threads, since two pools would fight for the cores.

   Plain C without headers of Python or PyTorch, compiled and loaded by `kernels.py`. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

enum { GRAIN = 32768 }; /* values below which a second thread costs more than it saves */

/* The OpenMP entry points that `kernels.py` found in the process. */
extern void (*bkn_parallel)(void (*)(void *), void *, unsigned, unsigned);
extern int (*bkn_thread_number)(void), (*bkn_team_size)(void);

typedef void (*Body)(const void *task, int64_t first, int64_t last);
typedef struct {
    Body body;
    const void *task;
    int64_t count;
} Region;

static inline void share_of_thread(void *data)
{
    const Region *region = data;
    int64_t number = bkn_thread_number(), threads = bkn_team_size(); /* maybe fewer than were asked for */
    int64_t first = region->count * number / threads, last = region->count * (number + 1) / threads;
    if (first < last)
        region->body(region->task, first, last);
}

/* Call body(task, first, last) so that the ranges cover 0 to count. */
static inline void run(Body body, const void *task, int64_t count, int64_t threads)
{
    if (threads > count)
        threads = count;
    if (threads <= 1) {
        body(task, 0, count);
        return;
    }
    Region region = {body, task, count};
    bkn_parallel(share_of_thread, &region, (unsigned)threads, 0);
}

static inline int64_t threads_for(int64_t values, int64_t threads)
{
    return values < GRAIN ? 1 : threads;
}
