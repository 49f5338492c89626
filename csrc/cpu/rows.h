// Walking rows: every vector of a row, the incomplete one at its end included, and parameter vectors as floats.
#pragma once

#include "simd.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

// A parameter vector as floats: itself, or a widened copy in `buffer`.
template <class T>
void widen_into(float* buffer, const void* source, int64_t n) {
    const T* p = static_cast<const T*>(source);
    int64_t c = 0;
    for (; c + W <= n; c += W) store(buffer + c, load(p + c));
    if (c < n) store_first(buffer + c, load_first(p + c, n - c), n - c);
}

const float* as_floats(float* buffer, const void* source, DType dtype, int64_t n) {
    if (source == nullptr || dtype == DType::f32) return static_cast<const float*>(source);
    dtype == DType::f16 ? widen_into<half>(buffer, source, n) : widen_into<bfloat>(buffer, source, n);
    return buffer;
}

template <class T>
void narrow_from(void* target, const float* source, int64_t n) {
    T* p = static_cast<T*>(target);
    int64_t c = 0;
    for (; c + W <= n; c += W) store(p + c, load(source + c));
    if (c < n) store_first(p + c, load_first(source + c, n - c), n - c);
}

void from_floats(void* target, const float* source, DType dtype, int64_t n) {
    if (dtype == DType::f32) narrow_from<float>(target, source, n);
    if (dtype == DType::f16) narrow_from<half>(target, source, n);
    if (dtype == DType::bf16) narrow_from<bfloat>(target, source, n);
}

// Applies `body(load, store, c)` to every vector of a row of n elements, the incomplete one at its end included.
template <class Body>
inline void for_columns(int64_t n, Body body) {
    int64_t c = 0;
    for (; c + W <= n; c += W) body([](auto* p) { return load(p); }, [](auto* p, vf v) { store(p, v); }, c);
    if (const int64_t rest = n - c)
        body([=](auto* p) { return load_first(p, rest); }, [=](auto* p, vf v) { store_first(p, v, rest); }, c);
}

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
