#include "threads.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace tinygpt::cpu {
namespace {

// Measured on 2 cores: an empty parallel region costs 0.5 to 1 µs, in which one core normalises about 4000 floats.
constexpr int64_t kGrain = 8192;

bool forked = false;

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int thread_count(int64_t tasks, int64_t elements) {
#ifdef _OPENMP
    if (forked || elements < 2 * kGrain) return 1;
    return static_cast<int>(std::max<int64_t>(1, std::min({int64_t{omp_get_max_threads()}, tasks, elements / kGrain})));
#else
    (void)tasks, (void)elements;
    return 1;
#endif
}

}  // namespace tinygpt::cpu
