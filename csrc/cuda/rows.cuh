// Rows of a matrix in vectors of 16 bytes, or of one element where rows are not aligned to more; and a matrix dealt out
// to threads.
#pragma once

#include "../ops.h"
#include "simt.cuh"

namespace tinygpt::cuda {

// Elements a thread moves at once.
template <class T, bool VECTORS>
constexpr int kLanes = VECTORS ? 16 / static_cast<int>(sizeof(T)) : 1;

template <int N>
struct Floats {
    float at[N];
};

template <int N, class T>
SIMT_DEVICE Floats<N> floats(const simt::Vector<T, N>& v) {
    Floats<N> f;
#pragma unroll
    for (int i = 0; i < N; ++i) f.at[i] = simt::to_float(v.at[i]);
    return f;
}

template <class T, int N>
SIMT_DEVICE simt::Vector<T, N> rounded(const Floats<N>& f) {
    simt::Vector<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.at[i] = simt::from_float<T>(f.at[i]);
    return v;
}

// N neighbours of a row of parameters in any type; at most 16 bytes a load.
template <int N, class P>
SIMT_DEVICE Floats<N> parameters_as(const P* p) {
    constexpr int most = 16 / static_cast<int>(sizeof(P)), each = N < most ? N : most;
    Floats<N> f;
#pragma unroll
    for (int first = 0; first < N; first += each) {
        const auto part = simt::load<P, each>(p + first);
#pragma unroll
        for (int i = 0; i < each; ++i) f.at[first + i] = simt::to_float(part.at[i]);
    }
    return f;
}
template <int N>
SIMT_DEVICE Floats<N> parameters(const void* p, DType dtype, int64_t c) {
    if (dtype == DType::f32) return parameters_as<N>(static_cast<const float*>(p) + c);
    if (dtype == DType::f16) return parameters_as<N>(static_cast<const simt::half*>(p) + c);
    return parameters_as<N>(static_cast<const simt::bfloat*>(p) + c);
}

template <int N, class P>
SIMT_DEVICE void put_parameters_as(P* p, const Floats<N>& values) {
    constexpr int most = 16 / static_cast<int>(sizeof(P)), each = N < most ? N : most;
#pragma unroll
    for (int first = 0; first < N; first += each) {
        simt::Vector<P, each> part;
#pragma unroll
        for (int i = 0; i < each; ++i) part.at[i] = simt::from_float<P>(values.at[first + i]);
        simt::store_global<P, each>(p + first, part);
    }
}
template <int N>
SIMT_DEVICE void put_parameters(void* p, DType dtype, int64_t c, const Floats<N>& values) {
    if (dtype == DType::f32) put_parameters_as<N>(static_cast<float*>(p) + c, values);
    if (dtype == DType::f16) put_parameters_as<N>(static_cast<simt::half*>(p) + c, values);
    if (dtype == DType::bf16) put_parameters_as<N>(static_cast<simt::bfloat*>(p) + c, values);
}
SIMT_DEVICE void put_parameter(void* p, DType dtype, int64_t c, float value) {
    put_parameters<1>(p, dtype, c, {{value}});
}

// N neighbours in float32, as `parameters_as` reads them.
template <int N>
SIMT_DEVICE void store_floats(float* to, const Floats<N>& f) {
    constexpr int each = N < 4 ? N : 4;
#pragma unroll
    for (int first = 0; first < N; first += each) {
        simt::Vector<float, each> part;
#pragma unroll
        for (int i = 0; i < each; ++i) part.at[i] = f.at[first + i];
        simt::store<float, each>(to + first, part);
    }
}

// A matrix dealt out to threads: one has N neighbouring columns, in rows `lane`, `lane` + lanes, + 2 lanes, ... or in
// what else there are `lanes` of. Blocks are as wide as the columns need, and hold several lanes where these are few.
struct Deal {
    int64_t lanes;
    int tiles;  // blocks side by side
};

// The column is an int: with 64 bits nvcc no longer sees that vectors are aligned, and stores their elements one by
// one.
struct Share {
    int64_t lane;
    int column;
};
template <int N>
SIMT_DEVICE Share share_of(const Deal& deal) {
    const unsigned group = blockIdx.x / deal.tiles, tile = blockIdx.x % deal.tiles;
    return {static_cast<int64_t>(group) * blockDim.y + threadIdx.y,
            static_cast<int>(tile * blockDim.x + threadIdx.x) * N};
}

constexpr int kDealt = 128;  // threads of such a block, at most

// Starts `kernel(arguments, deal, rest...)` for `lanes` of `cols` columns, N of them for a thread.
template <int N, class Arguments, class... Parameters, class... Rest>
void launch_dealt(const char* name, void (*kernel)(Arguments, Deal, Parameters...), int64_t lanes, int64_t cols,
                  simt::Stream stream, const Arguments& a, Rest... rest) {
    if (lanes == 0) return;
    const int64_t vectors = (cols + N - 1) / N, tiles = (vectors + kDealt - 1) / kDealt;
    const int64_t width = (vectors + tiles - 1) / tiles, height = kDealt / width;
    const dim3 grid(static_cast<unsigned>(tiles * ((lanes + height - 1) / height)));
    const dim3 block(static_cast<unsigned>(width), static_cast<unsigned>(height));
    simt::launch(name, kernel, grid, block, 0, stream, a, Deal{lanes, static_cast<int>(tiles)}, rest...);
}

// The end of a gradient that is a sum over rows: blocks or threads have left shares of it in `partial`, [shares, PARTS,
// cols] float32, and here these are added, always in the same order: who came first does not matter. A thread adds
// every kAdders-th share of one column, the first row of threads what they found: one thread for all shares would wait
// for each of its loads.
template <int PARTS>
struct Shares {
    const float* partial;
    int64_t shares, cols;
    void* out[PARTS];  // null where not wanted
    DType dtype[PARTS];
};

constexpr int kAddedColumns = 32, kAdders = 16;  // of a block

template <int PARTS>
__global__ void __launch_bounds__(kAddedColumns* kAdders) add_shares(Shares<PARTS> a) {
    SIMT_SHARED(float, sums, kAddedColumns* kAdders);
    const int part = static_cast<int>(blockIdx.y);
    void* out = a.out[0];
    DType dtype = a.dtype[0];
#pragma unroll
    for (int p = 1; p < PARTS; ++p)  // chosen, not indexed: nvcc would copy the arguments to each thread's stack
        if (p == part) {
            out = a.out[p];
            dtype = a.dtype[p];
        }
    if (out == nullptr) return;
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kAddedColumns + threadIdx.x;
    float sum = 0.0f;
    if (c < a.cols) {
#pragma unroll 8
        for (int64_t share = threadIdx.y; share < a.shares; share += kAdders)
            sum += a.partial[(share * PARTS + part) * a.cols + c];
    }
    sums[threadIdx.y * kAddedColumns + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= a.cols) return;
#pragma unroll
    for (int i = 1; i < kAdders; ++i) sum += sums[i * kAddedColumns + threadIdx.x];
    put_parameter(out, dtype, c, sum);
}

template <int PARTS>
void launch_add_shares(const char* name, const Shares<PARTS>& a, simt::Stream stream) {
    const dim3 grid(static_cast<unsigned>((a.cols + kAddedColumns - 1) / kAddedColumns), PARTS);
    simt::launch(name, add_shares<PARTS>, grid, dim3(kAddedColumns, kAdders), 0, stream, a);
}

__host__ __device__ inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace tinygpt::cuda
