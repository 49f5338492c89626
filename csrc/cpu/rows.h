// Walking rows: every vector of a row, the incomplete one at its end included; parameter vectors as floats; sums over
// rows.
#pragma once

#include "simd.h"
#include "threads.h"

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

inline const float* as_floats(float* buffer, const void* source, DType dtype, int64_t n) {
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

inline void from_floats(void* target, const float* source, DType dtype, int64_t n) {
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

// The same for rows of T, with `ahead(c)` once a cache line before it is worked on: there the caller asks for memory it
// will soon need. `body(load, store, c, k)` also learns k < 4, which sum to add to where one chain would be too slow.
template <class T, class Ahead, class Body>
inline void for_lines(int64_t n, Ahead ahead, Body body) {
    constexpr int64_t kLine = 64 / sizeof(T);
    constexpr int K = kLine > 2 * W ? kLine / W : 2;
    int64_t c = 0;
    for (; c + K * W <= n; c += K * W) {
        for (int64_t line = 0; line < K * W; line += kLine) ahead(c + line);
        for (int k = 0; k < K; ++k)
            body([](auto* p) { return load(p); }, [](auto* p, vf v) { store(p, v); }, c + k * W, k % 4);
    }
    for_columns(n - c, [&](auto get, auto put, int64_t at) { body(get, put, c + at, 0); });
}

// Sums over rows go in fixed chunks of rows, each with its own sums: the result does not depend on the number of
// threads, and long sums lose less. 32 rows are few enough to share 768 rows among 2 threads evenly.
inline int64_t chunks_of(int64_t rows) {
    const int64_t chunks = (rows + 31) / 32;
    return chunks < 1 ? 1 : chunks > 64 ? 64 : chunks;
}

// Adds the n sums of each chunk to the first one's, in the order of the chunks.
inline void add_chunks(float* sums, int64_t chunks, int64_t n) {
    constexpr int64_t kStrip = 256;
    const int64_t strips = (n + kStrip - 1) / kStrip;
    [[maybe_unused]] const int threads = cpu::thread_count(strips, chunks * n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t begin = strip * kStrip, end = begin + kStrip < n ? begin + kStrip : n;
        for (int64_t k = 1; k < chunks; ++k)
            for (int64_t c = begin; c < end; ++c) sums[c] += sums[k * n + c];
    }
}

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
