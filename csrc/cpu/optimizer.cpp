// AdamW and gradient clipping over all tensors of a model in one call, for one instruction set.
//
// AdamW (Loshchilov, Hutter 2019, algorithm 2), one pass over memory, with one square root and one division:
//     m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2,    g the gradient times grad_scale
//     p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// A model has a hundred small tensors and a few large ones: threads share all elements, laid end to end, evenly, and a
// thread's end moves down to a multiple of kStep elements of the tensor it falls into. Every element is computed alike
// wherever it lies, the incomplete vector at a tensor's end included, so the split does not show in the result.
//
// Clipping sums squares per piece of kStep elements, in float within a piece and in double over the pieces in their
// order, whoever computed them. Where nothing is to be scaled, the second pass is left out.

#include "kernels.h"
#include "math.h"
#include "memory.h"
#include "rows.h"
#include "threads.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

constexpr int64_t kStep = 2048;  // a multiple of 4 W

inline int64_t steps_of(int64_t n) { return (n + kStep - 1) / kStep; }

// Calls `body(tensor, begin, end)` for each part of the elements from..to of all tensors laid end to end.
template <class Tensor, class Body>
inline void for_part(const Tensor* tensors, int64_t count, int64_t from, int64_t to, Body body) {
    int64_t at = 0;
    for (int64_t i = 0; i < count && at < to; at += tensors[i++].size) {
        const int64_t n = tensors[i].size;
        const auto place = [&](int64_t x) { return x <= at ? 0 : x >= at + n ? n : (x - at) / kStep * kStep; };
        if (place(from) < place(to)) body(i, place(from), place(to));
    }
}

// The same, shared among threads.
template <class Tensor, class Body>
void for_all(const Tensor* tensors, int64_t count, Body body) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += tensors[i].size;
    const int threads = cpu::thread_count(steps_of(total), total);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int k = 0; k < threads; ++k) for_part(tensors, count, total * k / threads, total * (k + 1) / threads, body);
}

struct Coefficients {
    vf beta1, rest1, beta2, rest2, root, eps, keep, rate, scale;
};

template <class P, class G, class M>
void update(const AdamWTensor& t, int64_t begin, int64_t end, const Coefficients& k) {
    P* const param = static_cast<P*>(t.param);
    const G* const grad = static_cast<const G*>(t.grad);
    M* const exp_avg = static_cast<M*>(t.exp_avg);
    M* const exp_avg_sq = static_cast<M*>(t.exp_avg_sq);
    for_columns(end - begin, [&](auto get, auto put, int64_t c) {
        c += begin;
        const vf g = get(grad + c) * k.scale;
        const vf m = get(exp_avg + c) * k.beta1 + g * k.rest1;
        const vf v = get(exp_avg_sq + c) * k.beta2 + g * g * k.rest2;
        put(exp_avg + c, m);
        put(exp_avg_sq + c, v);
        put(param + c, get(param + c) * k.keep - k.rate * m / (sqrt(v) * k.root + k.eps));
    });
}

using Update = void (*)(const AdamWTensor&, int64_t, int64_t, const Coefficients&);

template <class P, class G>
Update update_for(DType moment) {
    return moment == DType::f32   ? update<P, G, float>
           : moment == DType::f16 ? update<P, G, half>
                                  : update<P, G, bfloat>;
}

template <class P>
Update update_for(DType grad, DType moment) {
    if (grad == DType::f32) return update_for<P, float>(moment);
    return grad == DType::f16 ? update_for<P, half>(moment) : update_for<P, bfloat>(moment);
}

Update update_for(const AdamWTensor& t) {
    if (t.param_dtype == DType::f32) return update_for<float>(t.grad_dtype, t.moment_dtype);
    if (t.param_dtype == DType::f16) return update_for<half>(t.grad_dtype, t.moment_dtype);
    return update_for<bfloat>(t.grad_dtype, t.moment_dtype);
}

}  // namespace

bool adamw_(const AdamW& a) {
    const double correction1 = 1.0 - __builtin_pow(a.beta1, static_cast<double>(a.step));
    const double correction2 = 1.0 - __builtin_pow(a.beta2, static_cast<double>(a.step));
    const auto wide = [](double x) { return splat(static_cast<float>(x)); };
    const Coefficients k{wide(a.beta1),
                         wide(1.0 - a.beta1),
                         wide(a.beta2),
                         wide(1.0 - a.beta2),
                         wide(1.0 / __builtin_sqrt(correction2)),
                         wide(a.eps),
                         wide(1.0 - a.lr * a.weight_decay),
                         wide(a.lr / correction1),
                         wide(a.grad_scale)};
    for_all(a.tensors, a.count,
            [&](int64_t i, int64_t begin, int64_t end) { update_for(a.tensors[i])(a.tensors[i], begin, end, k); });
    return true;
}

namespace {

// Squares too large or too small for a float, and what is no number at all.
template <class T>
double careful_square_sum(const T* g, int64_t n) {
    double total = 0.0;
    for_columns(n, [&](auto get, auto, int64_t c) {
        const vf x = get(g + c);
        for (int i = 0; i < W; ++i) total += static_cast<double>(x[i]) * x[i];
    });
    return total;
}

template <class T>
double square_sum(const T* g, int64_t n) {
    vf part[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= n; c += 4 * W)
        for (int k = 0; k < 4; ++k) {
            const vf x = load(g + c + k * W);
            part[k] += x * x;
        }
    for_columns(n - c, [&](auto get, auto, int64_t at) {
        const vf x = get(g + c + at);
        part[0] += x * x;
    });
    const v4 found = sums(part);
    const double total = (static_cast<double>(found[0]) + found[1]) + (static_cast<double>(found[2]) + found[3]);
    return total > 1e-30 && total < 1e38 ? total : careful_square_sum(g, n);
}

template <class T>
void scale(T* g, int64_t n, vf factor) {
    for_columns(n, [&](auto get, auto put, int64_t c) { put(g + c, get(g + c) * factor); });
}

// Calls `body` with the gradient as a pointer of its own type.
template <class Body>
inline auto with_type(const GradTensor& t, Body body) {
    if (t.dtype == DType::f32) return body(static_cast<float*>(t.grad));
    if (t.dtype == DType::f16) return body(static_cast<half*>(t.grad));
    return body(static_cast<bfloat*>(t.grad));
}

}  // namespace

bool clip_grad_norm_(const ClipGradNorm& a) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < a.count; ++i) pieces += steps_of(a.tensors[i].size);
    // A double per piece, and per tensor the number of its first one.
    double* sum = reinterpret_cast<double*>(cpu::workspace(2 * (pieces + a.count) + 1));
    if (sum == nullptr) return false;
    int64_t* first = reinterpret_cast<int64_t*>(sum + pieces);
    for (int64_t i = 0, at = 0; i < a.count; at += steps_of(a.tensors[i++].size)) first[i] = at;
    for_all(a.tensors, a.count, [&](int64_t i, int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c += kStep)
            sum[first[i] + c / kStep] =
                with_type(a.tensors[i], [&](auto* g) { return square_sum(g + c, end - c < kStep ? end - c : kStep); });
    });
    double total = 0.0;
    for (int64_t k = 0; k < pieces; ++k) total += sum[k];
    const double norm = __builtin_sqrt(total), factor = a.max_norm / (norm + 1e-6);
    *a.norm = static_cast<float>(norm);
    if (factor >= 1.0) return true;  // false for NaN: a norm that is not finite must show in the gradients
    for_all(a.tensors, a.count, [&](int64_t i, int64_t begin, int64_t end) {
        with_type(a.tensors[i], [&](auto* g) { scale(g + begin, end - begin, splat(static_cast<float>(factor))); });
    });
    return true;
}

}  // namespace tinygpt::TINYGPT_ISA
