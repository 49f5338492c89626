// Bias add and GELU in one pass, forward and backward (Hendrycks, Gimpel 2016).
//
// With z = x + bias:    y = z Phi(z),    dx = dy (Phi(z) + z phi(z)),    dbias = sum over rows dx
//
// log2 Phi(-|z|) is smooth: a polynomial of degree 8 and one exponential give Phi with an error below 6e-8, what
// float32 resolves at 1 (the coefficients are those of the Triton kernels, fitted over 0 .. 5.5; beyond, it goes on
// falling). Half the instructions of erff, and so few that the kernels can wait for memory. The tanh approximation is z
// times the logistic function of twice tanh's argument.
//
// A thread has its columns in several rows, so dbias is summed in registers first. Each share of the rows leaves one
// row of `partial`, and a second kernel adds these up.

#include "kernels.h"
#include "rows.cuh"

namespace tinygpt::cuda {
namespace {

constexpr int kRows = 2;  // that a thread has in flight
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kTanh1 = 1.5957691216057308f;  // 2 sqrt(2 / pi): tanh's argument doubled is kTanh1 z + kTanh3 z^3
constexpr float kTanh3 = 0.07135481282052724f;
constexpr float kDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)

SIMT_DEVICE float logistic(float u) { return __fdividef(1.0f, 1.0f + simt::exp2_fast(u * -kLog2e)); }

// Phi, the normal distribution function.
SIMT_DEVICE float distribution(float z) {
    const float a = fabsf(z);
    float p = a * -1.2560565210151253e-06f + 2.0940347894793376e-05f;
    p = p * a - 0.00010260142153128982f;
    p = p * a - 0.0003255116462241858f;
    p = p * a + 0.007288691587746143f;
    p = p * a - 0.05263585224747658f;
    p = p * a - 0.45916748046875f;
    p = p * a - 1.1511095762252808f;
    const float tail = simt::exp2_fast(p * a - 0.9999999403953552f);
    return z < 0.0f ? tail : 1.0f - tail;
}

template <bool TANH>
SIMT_DEVICE float gelu(float z) {
    return z * (TANH ? logistic(z * (z * z * kTanh3 + kTanh1)) : distribution(z));
}

template <bool TANH>
SIMT_DEVICE float slope(float z) {
    if (!TANH) return distribution(z) + z * kDensity * simt::exp2_fast(z * z * (-0.5f * kLog2e));
    const float u = z * (z * z * kTanh3 + kTanh1), e = simt::exp2_fast(fabsf(u) * -kLog2e),
                r = __fdividef(1.0f, 1.0f + e);
    const float p = u < 0.0f ? e * r : r;  // and p (1 - p) is e r^2: 1 - p would have lost its digits
    return p + z * e * r * r * (z * z * (3.0f * kTanh3) + kTanh1);
}

template <class T, bool VECTORS, bool TANH>
__global__ void __launch_bounds__(kDealt) forward(GeluFwd a, Deal deal) {
    constexpr int N = kLanes<T, VECTORS>;
    const Share mine = share_of<N>(deal);
    const int c = mine.column;
    if (mine.lane >= deal.lanes || c >= a.cols) return;
    const Floats<N> bias = a.bias ? parameters<N>(a.bias, a.bias_dtype, c) : Floats<N>{};
    simt::Vector<T, N> x[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        const int64_t row = mine.lane + k * deal.lanes;
        if (row < a.rows) x[k] = simt::load<T, N>(static_cast<const T*>(a.x) + row * a.x_stride + c);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        const int64_t row = mine.lane + k * deal.lanes;
        if (row >= a.rows) break;
        Floats<N> z = floats<N>(x[k]);
#pragma unroll
        for (int i = 0; i < N; ++i) z.at[i] = gelu<TANH>(z.at[i] + bias.at[i]);
        simt::store<T, N>(static_cast<T*>(a.y) + row * a.cols + c, rounded<T, N>(z));
    }
}

template <class T, bool VECTORS, bool TANH>
__global__ void __launch_bounds__(kDealt) backward(GeluBwd a, Deal deal, float* partial) {
    constexpr int N = kLanes<T, VECTORS>;
    const Share mine = share_of<N>(deal);
    const int c = mine.column;
    if (mine.lane >= deal.lanes || c >= a.cols) return;
    const Floats<N> bias = a.bias ? parameters<N>(a.bias, a.bias_dtype, c) : Floats<N>{};
    Floats<N> dbias = {};
    for (int64_t first = mine.lane; first < a.rows; first += kRows * deal.lanes) {
        simt::Vector<T, N> x[kRows], dy[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            const int64_t row = first + k * deal.lanes;
            if (row < a.rows) {
                x[k] = simt::load<T, N>(static_cast<const T*>(a.x) + row * a.x_stride + c);
                dy[k] = simt::load<T, N>(static_cast<const T*>(a.dy) + row * a.dy_stride + c);
            }
        }
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            const int64_t row = first + k * deal.lanes;
            if (row >= a.rows) break;
            const Floats<N> z = floats<N>(x[k]);
            Floats<N> dx = floats<N>(dy[k]);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                dx.at[i] *= slope<TANH>(z.at[i] + bias.at[i]);
                dbias.at[i] += dx.at[i];
            }
            if (a.dx) simt::store<T, N>(static_cast<T*>(a.dx) + row * a.cols + c, rounded<T, N>(dx));
        }
    }
    if (a.dbias) store_floats<N>(partial + mine.lane * a.cols + c, dbias);
}

template <class T>
void launch_forward(const GeluFwd& a, simt::Stream stream) {
    constexpr int N = kLanes<T, true>;
    const int64_t lanes = (a.rows + kRows - 1) / kRows;
    if (a.cols % N == 0 && a.x_stride % N == 0 && aligned(a.x) && aligned(a.y) && aligned(a.bias))
        launch_dealt<N>("gelu forward", a.tanh ? forward<T, true, true> : forward<T, true, false>, lanes, a.cols,
                        stream, a);
    else
        launch_dealt<1>("gelu forward", a.tanh ? forward<T, false, true> : forward<T, false, false>, lanes, a.cols,
                        stream, a);
}

template <class T>
void launch_backward(const GeluBwd& a, float* partial, simt::Stream stream) {
    constexpr int N = kLanes<T, true>;
    const int64_t lanes = a.dbias ? gelu_bwd_lanes(a.rows, a.cols) : (a.rows + kRows - 1) / kRows;
    if (a.cols % N == 0 && a.x_stride % N == 0 && a.dy_stride % N == 0 && aligned(a.x) && aligned(a.dy) &&
        aligned(a.dx) && aligned(a.bias))
        launch_dealt<N>("gelu backward", a.tanh ? backward<T, true, true> : backward<T, true, false>, lanes, a.cols,
                        stream, a, partial);
    else
        launch_dealt<1>("gelu backward", a.tanh ? backward<T, false, true> : backward<T, false, false>, lanes, a.cols,
                        stream, a, partial);
}

}  // namespace

void gelu_fwd(const GeluFwd& a, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.dtype == DType::f32) launch_forward<float>(a, on);
    if (a.dtype == DType::f16) launch_forward<simt::half>(a, on);
    if (a.dtype == DType::bf16) launch_forward<simt::bfloat>(a, on);
}

// As many threads as fill a GPU, but 16 rows for each: `partial` is then small beside what is read.
int64_t gelu_bwd_lanes(int64_t rows, int64_t cols) {
    const int64_t most = (int64_t{1} << 20) / cols, wanted = (rows + 15) / 16;
    return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

void gelu_bwd(const GeluBwd& a, float* partial, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.dtype == DType::f32) launch_backward<float>(a, partial, on);
    if (a.dtype == DType::f16) launch_backward<simt::half>(a, partial, on);
    if (a.dtype == DType::bf16) launch_backward<simt::bfloat>(a, partial, on);
    if (a.dbias == nullptr) return;
    launch_add_shares<1>("gelu backward, sums",
                         {partial, gelu_bwd_lanes(a.rows, a.cols), a.cols, {a.dbias}, {a.bias_dtype}}, on);
}

}  // namespace tinygpt::cuda
