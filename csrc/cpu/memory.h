// Scratch memory of kernels.
#pragma once

#include <cstdint>

namespace tinygpt::cpu {

// At least `floats` floats, aligned to a cache line, the calling thread's until it asks again; null when there is no
// memory. Kept between calls: a fresh 400 KB workspace costs a hundred page faults, more than the kernel it serves.
float* workspace(int64_t floats);

}  // namespace tinygpt::cpu
