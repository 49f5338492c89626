#include "memory.h"

#include <cstdlib>
#include <cstring>

namespace tinygpt::cpu {
namespace {

struct Workspace {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Workspace() { std::free(memory); }
};

thread_local Workspace own;

}  // namespace

float* workspace(int64_t floats) {
#ifdef TINYGPT_SANITIZED
    // Anew each time, no byte too many, and full of NaN: the sanitizers see who writes beyond it or keeps it too long,
    // and the tests who reads what nobody wrote.
    const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
    own.bytes = 0;
#else
    const int64_t bytes = (floats * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
#endif
    if (bytes > own.bytes) {
        std::free(own.memory);
        own.memory = nullptr;
        own.bytes = posix_memalign(&own.memory, 64, bytes) == 0 ? bytes : 0;
#ifdef TINYGPT_SANITIZED
        std::memset(own.memory, 0xff, own.bytes);
#endif
    }
    return own.bytes ? static_cast<float*>(own.memory) : nullptr;
}

}  // namespace tinygpt::cpu
