#include "memory.h"

#include <cstdlib>

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
    const int64_t bytes = (floats * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
    if (bytes > own.bytes) {
        std::free(own.memory);
        own.memory = nullptr;
        own.bytes = posix_memalign(&own.memory, 64, bytes) == 0 ? bytes : 0;
    }
    return own.bytes ? static_cast<float*>(own.memory) : nullptr;
}

}  // namespace tinygpt::cpu
