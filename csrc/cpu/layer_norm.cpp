// Layer norm, forward and backward, for one instruction set.
//
// Forward: a row is read from memory once; mean, variance around that mean, and result are three passes over a row that
// stays in the first-level cache. The textbook's E[x^2] - E[x]^2 would save a pass and lose every digit at a large mean.
//
// Backward, with xhat = (x - mean) rstd and g = dy * weight:
//     dx = rstd (g - mean(g) - xhat mean(g xhat)),    dweight = sum over rows dy * xhat,    dbias = sum over rows dy
// Rows go in fixed chunks, each with its own sums of dweight and dbias, added up at the end in the order of the chunks: the
// result does not depend on the number of threads, and long sums lose less. Inside a chunk four rows go together, so that
// the running sums are loaded and stored once for four.

#include <cstdlib>

#include "simd.h"
#include "threads.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

constexpr int64_t kRows = 4;    // rows per group
constexpr int64_t kChunk = 32;  // rows per chunk: few enough to share 768 rows among 2 threads evenly
constexpr int64_t kMaxChunks = 64;

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

template <class T>
void forward_row(const T* x, const float* weight, const float* bias, T* y, float* mean, float* rstd, int64_t n, float eps) {
    const int64_t whole = n / W * W, rest = n - whole;
    // Four sums: one alone would wait four cycles for each addition.
    vf a[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= n; c += 4 * W)
        for (int i = 0; i < 4; ++i) a[i] += load(x + c + i * W);
    for (; c < whole; c += W) a[0] += load(x + c);
    if (rest) a[1] += load_first(x + c, rest);
    const float m = sum((a[0] + a[1]) + (a[2] + a[3])) / n;
    const vf centre = splat(m);

    vf v[4] = {};
    for (c = 0; c + 4 * W <= n; c += 4 * W)
        for (int i = 0; i < 4; ++i) {
            const vf d = load(x + c + i * W) - centre;
            v[i] += d * d;
        }
    for (; c < whole; c += W) {
        const vf d = load(x + c) - centre;
        v[0] += d * d;
    }
    if (rest) {
        const vf d = keep(load_first(x + c, rest) - centre, rest);
        v[1] += d * d;
    }
    const float r = 1.0f / __builtin_sqrtf(sum((v[0] + v[1]) + (v[2] + v[3])) / n + eps);
    *mean = m;
    *rstd = r;

    const vf scale = splat(r);
    if (bias) {
        for (c = 0; c < whole; c += W) store(y + c, (load(x + c) - centre) * scale * load(weight + c) + load(bias + c));
        if (rest)
            store_first(y + c,
                        (load_first(x + c, rest) - centre) * scale * load_first(weight + c, rest) +
                            load_first(bias + c, rest),
                        rest);
    } else {
        for (c = 0; c < whole; c += W) store(y + c, (load(x + c) - centre) * scale * load(weight + c));
        if (rest) store_first(y + c, (load_first(x + c, rest) - centre) * scale * load_first(weight + c, rest), rest);
    }
}

template <class T>
void forward(const LayerNormFwd& a, const float* weight, const float* bias) {
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    [[maybe_unused]] const int threads = cpu::thread_count(a.rows, a.rows * a.cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < a.rows; ++r)
        forward_row(x + r * a.x_stride, weight, bias, y + r * a.cols, a.mean + r, a.rstd + r, a.cols, a.eps);
}

bool layer_norm_fwd(const LayerNormFwd& a) {
    float* buffer = static_cast<float*>(std::malloc(2 * a.cols * sizeof(float)));
    if (buffer == nullptr) return false;
    const float* weight = as_floats(buffer, a.weight, a.weight_dtype, a.cols);
    const float* bias = as_floats(buffer + a.cols, a.bias, a.bias_dtype, a.cols);
    if (a.dtype == DType::f32) forward<float>(a, weight, bias);
    if (a.dtype == DType::f16) forward<half>(a, weight, bias);
    if (a.dtype == DType::bf16) forward<bfloat>(a, weight, bias);
    std::free(buffer);
    return true;
}

// N rows at once. sums: dweight [cols] then dbias [cols], added to.
template <int N, class T>
void backward_rows(const LayerNormBwd& a, const float* weight, int64_t row, float* sums) {
    const int64_t n = a.cols, whole = n / W * W, rest = n - whole;
    const T *x[N], *dy[N];
    vf mean[N], rstd[N], along[N] = {}, level[N] = {};
    for (int i = 0; i < N; ++i) {
        x[i] = static_cast<const T*>(a.x) + (row + i) * a.x_stride;
        dy[i] = static_cast<const T*>(a.dy) + (row + i) * a.dy_stride;
        mean[i] = splat(a.mean[row + i]);
        rstd[i] = splat(a.rstd[row + i]);
    }
    float* dweight = sums;
    float* dbias = sums + n;
    auto accumulate = [&](int64_t c, auto get, auto put) {
        const vf w = get(weight + c);
        vf dw = get(dweight + c), db = get(dbias + c);
        for (int i = 0; i < N; ++i) {
            const vf d = get(dy[i] + c), xhat = (get(x[i] + c) - mean[i]) * rstd[i], g = d * w;
            dw += d * xhat;
            db += d;
            along[i] += g * xhat;  // beyond the row d is 0, whatever xhat is
            level[i] += g;
        }
        put(dweight + c, dw);
        put(dbias + c, db);
    };
    for (int64_t c = 0; c < whole; c += W)
        accumulate(c, [](auto* p) { return load(p); }, [](float* p, vf v) { store(p, v); });
    if (rest)
        accumulate(whole, [=](auto* p) { return load_first(p, rest); }, [=](float* p, vf v) { store_first(p, v, rest); });
    if (a.dx == nullptr) return;

    for (int i = 0; i < N; ++i) {
        T* dx = static_cast<T*>(a.dx) + (row + i) * n;
        const vf b = splat(sum(along[i]) / n), m = splat(sum(level[i]) / n);
        auto value = [&](vf d, vf w, vf v) { return rstd[i] * (d * w - m - (v - mean[i]) * rstd[i] * b); };
        for (int64_t c = 0; c < whole; c += W) store(dx + c, value(load(dy[i] + c), load(weight + c), load(x[i] + c)));
        if (rest)
            store_first(dx + whole,
                        value(load_first(dy[i] + whole, rest), load_first(weight + whole, rest),
                              load_first(x[i] + whole, rest)),
                        rest);
    }
}

template <class T>
void backward(const LayerNormBwd& a, const float* weight, float* sums, int64_t chunks) {
    const int64_t per_chunk = (a.rows + chunks - 1) / chunks;
    [[maybe_unused]] const int threads = cpu::thread_count(chunks, a.rows * a.cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < chunks; ++k) {
        const int64_t end = (k + 1) * per_chunk < a.rows ? (k + 1) * per_chunk : a.rows;
        float* own = sums + k * 2 * a.cols;
        std::memset(own, 0, 2 * a.cols * sizeof(float));
        int64_t row = k * per_chunk;
        for (; row + kRows <= end; row += kRows) backward_rows<kRows, T>(a, weight, row, own);
        for (; row < end; ++row) backward_rows<1, T>(a, weight, row, own);
    }
}

bool layer_norm_bwd(const LayerNormBwd& a) {
    int64_t chunks = (a.rows + kChunk - 1) / kChunk;
    chunks = chunks < 1 ? 1 : chunks > kMaxChunks ? kMaxChunks : chunks;
    const int64_t floats = (chunks * 2 + 1) * a.cols;
    float* buffer = static_cast<float*>(std::malloc(floats * sizeof(float)));
    if (buffer == nullptr) return false;
    float* sums = buffer + a.cols;
    const float* weight = as_floats(buffer, a.weight, a.weight_dtype, a.cols);
    if (a.dtype == DType::f32) backward<float>(a, weight, sums, chunks);
    if (a.dtype == DType::f16) backward<half>(a, weight, sums, chunks);
    if (a.dtype == DType::bf16) backward<bfloat>(a, weight, sums, chunks);
    for (int64_t k = 1; k < chunks; ++k)
        for (int64_t c = 0; c < 2 * a.cols; ++c) sums[c] += sums[k * 2 * a.cols + c];
    if (a.dweight) from_floats(a.dweight, sums, a.weight_dtype, a.cols);
    if (a.dbias) from_floats(a.dbias, sums + a.cols, a.bias_dtype, a.cols);
    std::free(buffer);
    return true;
}

}  // namespace

extern const CpuKernels cpu_kernels = {layer_norm_fwd, layer_norm_bwd};

}  // namespace tinygpt::TINYGPT_ISA
