#include "parallel.h"

void (*bkn_parallel)(void (*)(void *), void *, unsigned, unsigned);
int (*bkn_thread_number)(void), (*bkn_team_size)(void);

void bkn_initialize(void *parallel, void *thread_number, void *team_size)
{
    bkn_parallel = parallel;
    bkn_thread_number = thread_number;
    bkn_team_size = team_size;
}
