// How many threads a kernel may use.
#pragma once

#include <cstdint>

namespace tinygpt::cpu {

// Threads for `tasks` independent tasks over `elements` elements altogether: torch's number, 1 in a forked child
// (OpenMP's threads do not survive a fork, and waiting for them would hang), 1 where the work is smaller than the
// hand-off.
int thread_count(int64_t tasks, int64_t elements);

// How many elements are worth a thread, from now on; returns how many were. For tests: at 1, small cases are shared
// too.
int64_t set_grain(int64_t elements);

}  // namespace tinygpt::cpu
