// Cross-entropy, forward and backward.
//
// Forward, for a row z with target t, n classes and smoothing s:
//     lse = log(sum_j e^z_j),    loss = lse - (1 - s) z_t - s mean(z)
// One pass over memory: a thread keeps the largest value it met and the sum of exponentials below it, and scales the
// sum down when a larger one turns up (Milakov, Gimelshein 2018). One warp, four or sixteen take a row, the longer it
// is. The loss is put together from differences to the largest value: far from 0 they have more digits than the lse.
//
// Backward, one read and one write, one exponential per element, from the saved lse:
//     dz_j = (e^(z_j - lse) - s / n - (1 - s) [j = t]) * factor
// Rows may be written over themselves. A row whose target does not count is not read.
//
// With 50257 classes of two bytes no row but the first begins at a multiple of 16 bytes; but between the first such
// multiple inside a row and the last lie whole vectors, and what is left are fewer than a vector's elements at each
// end.
//
// A target that is no class makes its row's loss NaN, so that nobody can overlook it, and reads nothing.

#include "kernels.h"
#include "rows.cuh"

namespace tinygpt::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;        // of a block, unless one row takes more
constexpr int kInFlight = 2;         // vectors of a thread
constexpr int kSlab = 8;             // vectors of a thread of the backward
constexpr int kMeanWarps = 16;       // of the one block that adds up
constexpr float kLowest = -3.4e38f;  // below every logit that counts; with -inf itself, -inf - -inf would be NaN
constexpr float kLog2e = 1.4426950408889634f;

// Scaled after the difference is taken: before, it would cost a digit at large logits.
SIMT_DEVICE float exponential(float difference) { return simt::exp2_fast(difference * kLog2e); }

// A row cut into elements before the first multiple of 16 bytes, `groups` whole vectors, and elements behind the last.
struct Cut {
    int head, groups, tail;
};
template <int N, class T>
SIMT_DEVICE Cut cut_of(const T* row, int cols) {
    const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % N);
    const int ahead = beyond ? N - beyond : 0, head = ahead < cols ? ahead : cols;
    const int groups = (cols - head) / N;
    return {head, groups, cols - head - groups * N};
}
// The column of element i of those at both ends.
template <int N>
SIMT_DEVICE int edge_of(const Cut& cut, int i) {
    return i < cut.head ? i : i + cut.groups * N;
}

struct Sums {
    float top;    // the largest value
    float total;  // of e^(z - top)
    float plain;  // of z
};

template <int N>
SIMT_DEVICE void take(Sums& s, const Floats<N>& z) {
    float top = s.top;
#pragma unroll
    for (int i = 0; i < N; ++i) top = fmaxf(top, z.at[i]);  // passes NaN over; the total has it
    s.total *= exponential(s.top - top);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        s.total += exponential(z.at[i] - top);
        s.plain += z.at[i];
    }
    s.top = top;
}

SIMT_DEVICE Sums merged(const Sums& a, const Sums& b) {
    const float top = fmaxf(a.top, b.top);
    return {top, a.total * exponential(a.top - top) + b.total * exponential(b.top - top), a.plain + b.plain};
}

template <class T, int WARPS>
__global__ void __launch_bounds__(WARPS > 4 ? WARPS * kWarp : kThreads) forward(CrossEntropyFwd a) {
    constexpr int N = kLanes<T, true>, kStep = WARPS * kWarp;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= a.rows) return;  // a whole warp, of those that have a row each
    const int thread = threadIdx.x, cols = static_cast<int>(a.cols);
    const T* z = static_cast<const T*>(a.logits) + row * a.stride;
    const Cut cut = cut_of<N>(z, cols);

    Sums sums{kLowest, 0.0f, 0.0f};
    if (thread < cut.head + cut.tail) take<1>(sums, {{simt::to_float(z[edge_of<N>(cut, thread)])}});
    for (int first = thread; first < cut.groups; first += kInFlight * kStep) {
        simt::Vector<T, N> held[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)
            if (first + k * kStep < cut.groups) held[k] = simt::load<T, N>(z + cut.head + (first + k * kStep) * N);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)
            if (first + k * kStep < cut.groups) take<N>(sums, floats<N>(held[k]));
    }
    for (int step = kWarp / 2; step > 0; step /= 2)
        sums = merged(sums, {__shfl_xor_sync(simt::kWholeWarp, sums.top, step),
                             __shfl_xor_sync(simt::kWholeWarp, sums.total, step),
                             __shfl_xor_sync(simt::kWholeWarp, sums.plain, step)});
    if constexpr (WARPS > 1) {
        SIMT_SHARED(Sums, of_warps, WARPS);
        if (thread % kWarp == 0) of_warps[thread / kWarp] = sums;
        __syncthreads();
        if (thread == 0)
#pragma unroll 1  // ptxas would spill
            for (int i = 1; i < WARPS; ++i) sums = merged(sums, of_warps[i]);
    }
    if (thread > 0) return;

    const int64_t target = a.targets[row];
    const float log_total = logf(sums.total);
    float loss = 0.0f;
    if (target != a.ignore_index) {
        loss = NAN;
        if (target >= 0 && target < a.cols)
            loss = log_total + (1.0f - a.smoothing) * (sums.top - simt::to_float(z[target]));
        if (a.smoothing > 0.0f) loss += a.smoothing * (sums.top - sums.plain / a.cols);
    }
    a.lse[row] = sums.top + log_total;
    a.loss[row] = loss;
}

// VECTORS: a row of logits and its gradient lie alike between multiples of 16 bytes.
template <class T, bool VECTORS>
__global__ void __launch_bounds__(kThreads) backward(CrossEntropyBwd a) {
    constexpr int N = kLanes<T, VECTORS>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= a.rows) return;
    const int thread = threadIdx.x, step = blockDim.x, vocab = static_cast<int>(a.vocab);
    const T* z = static_cast<const T*>(a.logits) + row * a.stride;
    T* dz = static_cast<T*>(a.dlogits) + row * a.dlogits_stride;
    const Cut cut = cut_of<N>(dz, static_cast<int>(a.cols));
    const bool counts = a.targets[row] != a.ignore_index;
    const int target = a.targets[row] >= 0 && a.targets[row] < vocab ? static_cast<int>(a.targets[row]) : -1;
    const float lse = a.lse[row], factor = *a.dloss;
    const float level = a.smoothing / a.vocab * factor, at_target = (1.0f - a.smoothing) * factor;
    // N logits from column c on become their gradient.
    const auto put = [&](int c, auto held) {
        constexpr int M = sizeof held / sizeof(T);
        Floats<M> g = {};
        if (counts) {
            g = floats<M>(held);
#pragma unroll
            for (int i = 0; i < M; ++i) {
                g.at[i] = exponential(g.at[i] - lse) * factor - level;
                if (c + i == target) g.at[i] -= at_target;
            }
            if (c + M > vocab)
#pragma unroll
                for (int i = 0; i < M; ++i)
                    if (c + i >= vocab) g.at[i] = 0.0f;
        }
        simt::store<T, M>(dz + c, rounded<T, M>(g));
    };

    if (blockIdx.y == 0 && thread < cut.head + cut.tail) {
        const int c = edge_of<N>(cut, thread);
        put(c, counts ? simt::load<T, 1>(z + c) : simt::Vector<T, 1>{});
    }
    const int begin = blockIdx.y * kSlab * step + thread;
    for (int first = begin; first < begin + kSlab * step; first += kInFlight * step) {
        simt::Vector<T, N> held[kInFlight] = {};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)
            if (counts && first + k * step < cut.groups)
                held[k] = simt::load<T, N>(z + cut.head + (first + k * step) * N);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)
            if (first + k * step < cut.groups) put(cut.head + (first + k * step) * N, held[k]);
    }
}

__global__ void __launch_bounds__(kMeanWarps* kWarp) mean(Mean a) {
    SIMT_SHARED(float, sums, kMeanWarps);
    SIMT_SHARED(int, counts, kMeanWarps);
    const int thread = threadIdx.x;
    float sum = 0.0f;
    for (int64_t i = thread; i < a.count; i += kMeanWarps * kWarp) sum += a.values[i];
    int count = 0;
    if (a.denominator == nullptr)
        for (int64_t i = thread; i < a.rows; i += kMeanWarps * kWarp) count += a.targets[i] != a.ignore_index;
    sum = simt::warp_sum(sum);
    for (int step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(simt::kWholeWarp, count, step);
    if (thread % kWarp == 0) {
        sums[thread / kWarp] = sum;
        counts[thread / kWarp] = count;
    }
    __syncthreads();
    if (thread > 0) return;
    for (int i = 1; i < kMeanWarps; ++i) {
        sum += sums[i];
        count += counts[i];
    }
    *a.mean = sum / (a.denominator ? *a.denominator : count > 1 ? count : 1);
}

template <class T, int WARPS>
void launch_forward(const CrossEntropyFwd& a, simt::Stream stream) {
    constexpr int kRows = WARPS < 4 ? 4 / WARPS : 1;  // of a block
    const dim3 grid(static_cast<unsigned>((a.rows + kRows - 1) / kRows));
    simt::launch("cross_entropy forward", forward<T, WARPS>, grid, dim3(WARPS * kWarp, kRows), 0, stream, a);
}

template <class T>
void launch_forward(const CrossEntropyFwd& a, simt::Stream stream) {
    if (a.cols <= 1024)
        launch_forward<T, 1>(a, stream);
    else if (a.cols <= 8192)
        launch_forward<T, 4>(a, stream);
    else
        launch_forward<T, 16>(a, stream);
}

template <class T>
void launch_backward(const CrossEntropyBwd& a, simt::Stream stream) {
    constexpr int N = kLanes<T, true>;
    const auto apart = reinterpret_cast<uintptr_t>(a.logits) - reinterpret_cast<uintptr_t>(a.dlogits);
    const bool vectors = apart % 16 == 0 && (a.stride - a.dlogits_stride) % N == 0;
    const int width = a.cols <= 1024 ? kWarp : kThreads, height = kThreads / width;
    const int64_t slab = static_cast<int64_t>(width) * kSlab * (vectors ? N : 1);
    const dim3 grid(static_cast<unsigned>((a.rows + height - 1) / height),
                    static_cast<unsigned>((a.cols + slab - 1) / slab));
    simt::launch("cross_entropy backward", vectors ? backward<T, true> : backward<T, false>, grid, dim3(width, height),
                 0, stream, a);
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyFwd& a, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.rows == 0) return;
    if (a.dtype == DType::f32) launch_forward<float>(a, on);
    if (a.dtype == DType::f16) launch_forward<simt::half>(a, on);
    if (a.dtype == DType::bf16) launch_forward<simt::bfloat>(a, on);
}

void cross_entropy_bwd(const CrossEntropyBwd& a, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.rows == 0) return;
    if (a.dtype == DType::f32) launch_backward<float>(a, on);
    if (a.dtype == DType::f16) launch_backward<simt::half>(a, on);
    if (a.dtype == DType::bf16) launch_backward<simt::bfloat>(a, on);
}

void cross_entropy_mean(const Mean& a, Stream stream) {
    simt::launch("cross_entropy mean", mean, dim3(1), dim3(kMeanWarps * kWarp), 0, static_cast<simt::Stream>(stream),
                 a);
}

}  // namespace tinygpt::cuda
