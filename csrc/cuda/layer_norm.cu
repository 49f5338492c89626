// Layer norm, and a residual addition before it, forward and backward (Ba, Kiros, Hinton 2016).
//
// Forward: a warp takes a row, a lane every 32nd vector of it. The row's first vectors stay in registers for the three
// passes (mean, variance around it, result); of longer rows the rest is read again, from the first-level cache.
//
// Backward: with xhat = (x - mean) rstd and g = dy weight,
//     dx = rstd (g - mean(g) - xhat mean(g xhat)),    dweight = sum over rows dy xhat,    dbias = sum over rows dy
// A block takes rows blockIdx, + gridDim, ... one after the other. A thread always has the same columns, and so has
// their sums of dweight and dbias for itself: for its first HELD vectors in registers, for the rest of long rows in the
// block's part of `partial`. A second kernel adds up the blocks' sums.

#include "kernels.h"
#include "rows.cuh"

namespace tinygpt::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarp * kWarps;
constexpr int kHeldForward = 8;  // vectors of a row that a thread keeps

template <class T, int N>
SIMT_DEVICE Floats<N> row_at(const T* row, int64_t c) {
    return floats<N>(simt::load<T, N>(row + c));
}

template <class T, bool VECTORS>
__global__ void __launch_bounds__(kThreads) forward(LayerNormFwd a) {
    constexpr int N = kLanes<T, VECTORS>, kStep = kWarp * N, kHeld = kHeldForward;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
    if (row >= a.rows) return;  // a whole warp: no lane is missed by the others
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    T* h = a.h ? static_cast<T*>(a.h) + row * a.cols : nullptr;

    // What is normalised: x, or the sum as it is stored. The sum is made in the first pass, and is there in the others.
    const auto first = [&](int64_t c) {
        if (residual == nullptr) return row_at<T, N>(x, c);
        Floats<N> sum = row_at<T, N>(x, c);
        const Floats<N> other = row_at<T, N>(residual, c);
#pragma unroll
        for (int i = 0; i < N; ++i) sum.at[i] += other.at[i];
        const auto stored = rounded<T, N>(sum);
        simt::store<T, N>(h + c, stored);
        return floats<N>(stored);
    };
    const T* again = residual ? h : x;

    Floats<N> held[kHeld];
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
        const int64_t c = k * kStep + lane * N;
        if (c < a.cols) {
            held[k] = first(c);
#pragma unroll
            for (int i = 0; i < N; ++i) total += held[k].at[i];
        }
    }
    for (int64_t c = kHeld * kStep + lane * N; c < a.cols; c += kStep) {
        const Floats<N> v = first(c);
#pragma unroll
        for (int i = 0; i < N; ++i) total += v.at[i];
    }
    const float mean = simt::warp_sum(total) / a.cols;

    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
        if (k * kStep + lane * N < a.cols) {
#pragma unroll
            for (int i = 0; i < N; ++i) squares += (held[k].at[i] - mean) * (held[k].at[i] - mean);
        }
    for (int64_t c = kHeld * kStep + lane * N; c < a.cols; c += kStep) {
        const Floats<N> v = row_at<T, N>(again, c);
#pragma unroll
        for (int i = 0; i < N; ++i) squares += (v.at[i] - mean) * (v.at[i] - mean);
    }
    const float rstd = rsqrtf(simt::warp_sum(squares) / a.cols + a.eps);
    if (lane == 0) {
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }

    const auto put = [&](int64_t c, const Floats<N>& v) {
        const Floats<N> weight = parameters<N>(a.weight, a.weight_dtype, c);
        Floats<N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) out.at[i] = (v.at[i] - mean) * rstd * weight.at[i];
        if (a.bias) {
            const Floats<N> bias = parameters<N>(a.bias, a.bias_dtype, c);
#pragma unroll
            for (int i = 0; i < N; ++i) out.at[i] += bias.at[i];
        }
        simt::store<T, N>(y + c, rounded<T, N>(out));
    };
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
        const int64_t c = k * kStep + lane * N;
        if (c < a.cols) put(c, held[k]);
    }
    for (int64_t c = kHeld * kStep + lane * N; c < a.cols; c += kStep) put(c, row_at<T, N>(again, c));
}

template <class T, bool VECTORS, int HELD>
__global__ void __launch_bounds__(kThreads, HELD == 1   ? 4
                                            : HELD == 2 ? 3
                                                        : 2) backward(LayerNormBwd a, float* partial) {
    constexpr int N = kLanes<T, VECTORS>, kStep = kThreads * N;
    const int thread = threadIdx.x, warp = thread / kWarp;
    // Sums of the warps, along xhat and level; two sets in turn, so that a row needs one barrier and not two.
    SIMT_SHARED(float, warp_sums, 2 * 2 * kWarps);
    const int64_t rest = a.cols > HELD * kStep ? a.cols - HELD * kStep : 0;
    float* own = partial + static_cast<int64_t>(blockIdx.x) * 2 * a.cols;
    float* far_weight = own + HELD * kStep;  // sums of the columns that registers do not hold
    float* far_bias = own + a.cols + HELD * kStep;
    for (int64_t c = thread * N; c < rest; c += kStep) {
        store_floats<N>(far_weight + c, {});
        store_floats<N>(far_bias + c, {});
    }

    Floats<N> dweight[HELD] = {}, dbias[HELD] = {};
    int turn = 0;
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
        const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
        const float mean = a.mean[row], rstd = a.rstd[row];
        simt::Vector<T, N> held_dy[HELD], held_x[HELD];
        float along = 0.0f, level = 0.0f;
        const auto gather = [&](int64_t c, const Floats<N>& d, const Floats<N>& v, auto add) {
            const Floats<N> weight = parameters<N>(a.weight, a.weight_dtype, c);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float xhat = (v.at[i] - mean) * rstd, g = d.at[i] * weight.at[i];
                add(i, d.at[i] * xhat, d.at[i]);
                along += g * xhat;
                level += g;
            }
        };
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            const int64_t c = k * kStep + thread * N;
            if (c < a.cols) {
                held_dy[k] = simt::load<T, N>(dy + c);
                held_x[k] = simt::load<T, N>(x + c);
                gather(c, floats<N>(held_dy[k]), floats<N>(held_x[k]), [&](int i, float weight, float bias) {
                    dweight[k].at[i] += weight;
                    dbias[k].at[i] += bias;
                });
            }
        }
        for (int64_t c = thread * N; c < rest; c += kStep) {
            const int64_t column = HELD * kStep + c;
            Floats<N> more_weight = parameters_as<N>(far_weight + c), more_bias = parameters_as<N>(far_bias + c);
            gather(column, row_at<T, N>(dy, column), row_at<T, N>(x, column), [&](int i, float weight, float bias) {
                more_weight.at[i] += weight;
                more_bias.at[i] += bias;
            });
            store_floats<N>(far_weight + c, more_weight);
            store_floats<N>(far_bias + c, more_bias);
        }
        along = simt::warp_sum(along);
        level = simt::warp_sum(level);
        float* sums = warp_sums + turn * 2 * kWarps;
        if (thread % kWarp == 0) {
            sums[warp] = along;
            sums[kWarps + warp] = level;
        }
        __syncthreads();
        along = level = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            along += sums[i];
            level += sums[kWarps + i];
        }
        if (a.dx == nullptr) continue;
        along /= a.cols;
        level /= a.cols;
        T* dx = static_cast<T*>(a.dx) + row * a.cols;
        const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.dh_stride : nullptr;
        const auto put = [&](int64_t c, const Floats<N>& d, const Floats<N>& v) {
            const Floats<N> weight = parameters<N>(a.weight, a.weight_dtype, c);
            Floats<N> out;
#pragma unroll
            for (int i = 0; i < N; ++i)
                out.at[i] = rstd * (d.at[i] * weight.at[i] - level - (v.at[i] - mean) * rstd * along);
            if (dh) {
                const Floats<N> other = row_at<T, N>(dh, c);
#pragma unroll
                for (int i = 0; i < N; ++i) out.at[i] += other.at[i];
            }
            simt::store<T, N>(dx + c, rounded<T, N>(out));
        };
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            const int64_t c = k * kStep + thread * N;
            if (c < a.cols) put(c, floats<N>(held_dy[k]), floats<N>(held_x[k]));
        }
        for (int64_t c = HELD * kStep + thread * N; c < a.cols; c += kStep)
            put(c, row_at<T, N>(dy, c), row_at<T, N>(x, c));
    }

#pragma unroll
    for (int k = 0; k < HELD; ++k) {
        const int64_t c = k * kStep + thread * N;
        if (c < a.cols) {
            store_floats<N>(own + c, dweight[k]);
            store_floats<N>(own + a.cols + c, dbias[k]);
        }
    }
}

template <class T>
void launch_forward(const LayerNormFwd& a, simt::Stream stream) {
    constexpr int N = kLanes<T, true>;
    const bool vectors = a.cols % N == 0 && a.x_stride % N == 0 && a.residual_stride % N == 0 && aligned(a.x) &&
                         aligned(a.residual) && aligned(a.y) && aligned(a.h) && aligned(a.weight) && aligned(a.bias);
    const dim3 grid(static_cast<unsigned>((a.rows + kWarps - 1) / kWarps));
    simt::launch("layer_norm forward", vectors ? forward<T, true> : forward<T, false>, grid, dim3(kThreads), 0, stream,
                 a);
}

template <class T>
void launch_backward(const LayerNormBwd& a, float* partial, simt::Stream stream) {
    constexpr int N = kLanes<T, true>;
    const bool vectors = a.cols % N == 0 && a.x_stride % N == 0 && a.dy_stride % N == 0 && a.dh_stride % N == 0 &&
                         aligned(a.x) && aligned(a.dy) && aligned(a.dh) && aligned(a.dx) && aligned(a.weight);
    constexpr int kStep = kThreads * N;
    const auto kernel = !vectors              ? backward<T, false, 2>
                        : a.cols <= kStep     ? backward<T, true, 1>
                        : a.cols <= 2 * kStep ? backward<T, true, 2>
                                              : backward<T, true, 4>;
    simt::launch("layer_norm backward", kernel, dim3(static_cast<unsigned>(layer_norm_bwd_blocks(a.rows))),
                 dim3(kThreads), 0, stream, a, partial);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& a, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.rows == 0) return;
    if (a.dtype == DType::f32) launch_forward<float>(a, on);
    if (a.dtype == DType::f16) launch_forward<simt::half>(a, on);
    if (a.dtype == DType::bf16) launch_forward<simt::bfloat>(a, on);
}

// Enough of them to keep a GPU's memory busy; few enough that their sums are small beside the rows: 16 rows for each.
int64_t layer_norm_bwd_blocks(int64_t rows) {
    const int64_t wanted = rows / 16 < 128 ? 128 : rows / 16 > 512 ? 512 : rows / 16;
    return rows < 1 ? 1 : rows < wanted ? rows : wanted;
}

void layer_norm_bwd(const LayerNormBwd& a, float* partial, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.dtype == DType::f32) launch_backward<float>(a, partial, on);
    if (a.dtype == DType::f16) launch_backward<simt::half>(a, partial, on);
    if (a.dtype == DType::bf16) launch_backward<simt::bfloat>(a, partial, on);
    if (a.dweight == nullptr && a.dbias == nullptr) return;
    launch_add_shares<2>(
        "layer_norm backward, sums",
        {partial, layer_norm_bwd_blocks(a.rows), a.cols, {a.dweight, a.dbias}, {a.weight_dtype, a.bias_dtype}}, on);
}

}  // namespace tinygpt::cuda
