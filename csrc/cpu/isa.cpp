#include "isa.h"

#include <atomic>

#ifdef TINYGPT_HAS_avx2
#include <cpuid.h>
#endif

namespace tinygpt {

#define TINYGPT_DECLARE(name)            \
    namespace name {                     \
    extern const CpuKernels cpu_kernels; \
    }
#ifdef TINYGPT_HAS_neon
TINYGPT_DECLARE(neon)
#else
TINYGPT_DECLARE(baseline)
#endif
#ifdef TINYGPT_HAS_avx2
TINYGPT_DECLARE(avx2)
#endif
#ifdef TINYGPT_HAS_avx512
TINYGPT_DECLARE(avx512)
#endif

namespace cpu {
namespace {

struct Candidate {
    const char* name;
    const CpuKernels* kernels;
    bool (*supported)();
};

#ifdef TINYGPT_HAS_avx2
bool has_f16c() {  // Clang 14 does not know it by name
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Candidate candidates[] = {
#ifdef TINYGPT_HAS_neon
    {"neon", &neon::cpu_kernels, [] { return true; }},
#else
    {"baseline", &baseline::cpu_kernels, [] { return true; }},
#endif
#ifdef TINYGPT_HAS_avx2
    {"avx2", &avx2::cpu_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }},
#endif
#ifdef TINYGPT_HAS_avx512
    {"avx512", &avx512::cpu_kernels,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("fma") && has_f16c();
     }},
#endif
};

const Candidate* best() {
    const Candidate* found = candidates;
    for (const Candidate& candidate : candidates)
        if (candidate.supported()) found = &candidate;
    return found;
}

std::atomic<const Candidate*>& chosen() {
    static std::atomic<const Candidate*> candidate{best()};
    return candidate;
}

}  // namespace

const CpuKernels& kernels() { return *chosen().load(std::memory_order_relaxed)->kernels; }

std::string isa() { return chosen().load()->name; }

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Candidate& candidate : candidates)
        if (candidate.supported()) names.emplace_back(candidate.name);
    return names;
}

bool set_isa(const std::string& name) {
    for (const Candidate& candidate : candidates)
        if (name == candidate.name && candidate.supported()) {
            chosen() = &candidate;
            return true;
        }
    return false;
}

}  // namespace cpu
}  // namespace tinygpt
