// Kernels that test simt.cuh; what they take is said where they are, in wrappers.cu.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wrappers {

bool run(const char* name, const float* in, float* out, int blocks, size_t shared_bytes);  // false: no such kernel
void mma(bool is_bfloat, const uint32_t* in, const float* start, float* out);
void ldmatrix(int count, bool transposed, const uint16_t* in, uint32_t* out);
void shuffle(const float* in, float* out);
void copy(const float* in, float* out);
void pack(bool is_bfloat, const float* in, uint32_t* out, float* back);
void store(const float* in, float* out);
void power(const float* in, float* out);
void count(float* out);
void number(float* out);

}  // namespace wrappers
