// Cross-entropy, forward and backward, for one instruction set.
//
// Forward, for a row z with target t, n classes and smoothing s:
//     lse = log(sum_j e^z_j),    loss = lse - (1 - s) z_t - s mean(z)
// One pass over memory: a row goes in blocks that stay in the first-level cache, each read for its largest value and
// again for its exponentials, the sum of what came before scaled down when a larger value turns up (Milakov, Gimelshein
// 2018). The largest value is kept per lane of a vector, so that no block waits for a horizontal maximum; only a row's
// first block starts from one, and so a row of a single block needs no rescaling at all.
//
// Backward, one exponential per element, from the saved lse:
//     dz_j = (e^(z_j - lse) - s / n - (1 - s) [j = t]) * dloss / denominator
// A row may be written over itself: what is needed of it later is read before anything is stored.
//
// linear_cross_entropy hands over slices of columns, one after the other. A row's state between them is its lse so far
// and the rest of its loss so far, in double: a hundred slices rounded to float would cost the lse its last digit.
//
// Losses of rows are added by one thread in their order, in double: the sum does not depend on the number of threads.
// A target that is no class makes its row's loss NaN, so that nobody can overlook it, and reads nothing.
// Left out: keeping e^(z - max) for the backward. It is R x V floats, and reading them costs what computing them does.

#include "kernels.h"
#include "math.h"
#include "memory.h"
#include "rows.h"
#include "threads.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

constexpr int64_t kBlock = 512;      // elements between two rescalings, a multiple of 4 W
constexpr float kLowest = -3.4e38f;  // below every logit that counts; with -inf itself, -inf - -inf would be NaN

// What a row's incomplete last vector holds. Its lanes lie at the row's end, over elements that whole vectors cover
// too, or, in a row shorter than a vector, at its beginning.
struct Edge {
    int64_t whole;  // elements in whole vectors
    vi inside;      // its lanes that no whole vector has
};

inline Edge edge_of(int64_t n) {
    const int64_t rest = n % W;
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    const int32_t low = n >= W ? static_cast<int32_t>(W - rest) : 0;
    const int32_t high = n >= W ? W : static_cast<int32_t>(rest);
    return {n - rest, (lane >= low) & (lane < high)};
}

template <class T>
inline vf load_edge(const T* z, int64_t n) {
    return n >= W ? load(z + n - W) : load_first(z, n);
}

// Maxima by lane of n elements (whole vectors) and of `top`. NaN is passed over here; the sum of exponentials has it.
template <class T>
inline vf highest(const T* z, int64_t n, vf top) {
    vf a[4] = {top, top, top, top};
    int64_t c = 0;
    for (; c + 4 * W <= n; c += 4 * W)
        for (int k = 0; k < 4; ++k) a[k] = maximum(load(z + c + k * W), a[k]);
    for (; c < n; c += W) a[0] = maximum(load(z + c), a[0]);
    return maximum(maximum(a[0], a[1]), maximum(a[2], a[3]));
}

// e^x for a sum in which some term is 1: what is below e^-87 counts as e^-87. NaN stays NaN.
template <int N>
inline void exp_terms(vf (&x)[N]) {
    for (int k = 0; k < N; ++k) x[k] = maximum(splat(kExpLow), x[k]);
    exp_within(x);
}
inline vf exp_term(vf x) {
    vf one[1] = {x};
    exp_terms(one);
    return one[0];
}

struct Sums {
    float top, total, plain;  // largest z, sum of e^(z - top), sum of z
};

// Sums over n elements (whole vectors) of e^(z - top) and, where Smoothed, of z.
template <bool Smoothed, class T>
inline void add_terms(const T* z, int64_t n, vf top, vf& total, vf& plain) {
    vf sum[4] = {}, sum_z[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= n; c += 4 * W)
        for (int k = 0; k < 4; k += 2) {
            const vf x = load(z + c + k * W), y = load(z + c + k * W + W);
            vf term[2] = {x - top, y - top};
            exp_terms(term);
            sum[k] += term[0];
            sum[k + 1] += term[1];
            if (Smoothed) sum_z[k] += x, sum_z[k + 1] += y;
        }
    for (; c < n; c += W) {
        const vf x = load(z + c);
        sum[0] += exp_term(x - top);
        if (Smoothed) sum_z[0] += x;
    }
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if (Smoothed) plain += (sum_z[0] + sum_z[1]) + (sum_z[2] + sum_z[3]);
}

template <bool Smoothed, class T>
inline Sums sums_of(const T* z, int64_t n, const Edge& edge) {
    const bool has_edge = edge.whole < n;
    vf last = {}, top = splat(kLowest), total = {}, plain = {};
    if (has_edge) {
        last = load_edge(z, n);
        top = choose(edge.inside & (last > top), last, top);
    }
    int64_t length = edge.whole < kBlock ? edge.whole : kBlock;
    top = splat(largest(highest(z, length, top)));
    add_terms<Smoothed>(z, length, top, total, plain);
    for (int64_t c = length; c < edge.whole; c += length) {
        length = edge.whole - c < kBlock ? edge.whole - c : kBlock;
        const vf higher = highest(z + c, length, top);
        total *= exp_term(top - higher);
        top = higher;
        add_terms<Smoothed>(z + c, length, top, total, plain);
    }
    if (has_edge) {
        total += choose(edge.inside, exp_term(last - top), vf{});
        if (Smoothed) plain += choose(edge.inside, last, vf{});
    }
    const float level = largest(top);
    if (edge.whole > kBlock) total *= exp_term(top - splat(level));
    const vf both[4] = {total, plain, vf{}, vf{}};
    const v4 found = sums(both);
    return {level, found[0], found[1]};
}

// A row's lse and loss, from its sums, log(total), and how far its target's share of the loss lies below the top:
// (1 - s) (top - z_t) + s (top - mean). Near differences of large numbers are exact; lse - z_t would not be.
inline float lse_of(float top, float log_total, float total) {
    if (top == __builtin_inff()) return top;
    return top == kLowest && total == total ? -__builtin_inff() : top + log_total;
}

template <bool B>
struct Bool {
    static constexpr bool value = B;
};

struct State {
    double lse, rest;  // over the columns so far; the row's loss is their sum
};

// log(e^a + e^b)
inline double merged(double a, double b) {
    const double high = a > b ? a : b, low = a > b ? b : a;
    if (low == -__builtin_inf() || high == __builtin_inf()) return a == a ? (b == b ? high : b) : a;
    return high + __builtin_log1p(__builtin_exp(low - high));
}

inline float one(const float* p) { return *p; }
template <class T>
inline float one(const T* p) {
    return load_first(p, 1)[0];
}

// Calls `body(row, sums, chosen)` for every row, in parallel; chosen: the target's logit, or null.
template <bool Smoothed, class T, class Body>
inline void for_rows(const CrossEntropyFwd& a, Body body) {
    const Edge edge = edge_of(a.cols);
    [[maybe_unused]] const int threads = cpu::thread_count(a.rows, a.rows * a.cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < a.rows; ++r) {
        const T* z = static_cast<const T*>(a.logits) + r * a.stride;
        const int64_t target = a.targets[r] - a.first;
        const bool here = a.targets[r] != a.ignore_index && target >= 0 && target < a.cols;
        body(r, sums_of<Smoothed>(z, a.cols, edge), here ? z + target : nullptr);
    }
}

template <bool Smoothed, class T>
void add_columns(const CrossEntropyFwd& a, State* state) {
    for_rows<Smoothed, T>(a, [&](int64_t r, const Sums& s, const T* chosen) {
        double part = chosen ? (a.smoothing - 1.0) * one(chosen) : 0.0;
        if (Smoothed) part -= static_cast<double>(a.smoothing) * s.plain / a.classes;
        const double lse = lse_of(s.top, __builtin_logf(s.total), s.total);
        state[r] = a.first ? State{merged(state[r].lse, lse), state[r].rest + part} : State{lse, part};
    });
}

template <bool Smoothed, class T>
void add_whole_rows(const CrossEntropyFwd& a, float* top, float* total, float* below) {
    const float inverse = 1.0f / a.classes;
    for_rows<Smoothed, T>(a, [&](int64_t r, const Sums& s, const T* chosen) {
        top[r] = s.top;
        total[r] = s.total;
        below[r] = chosen ? (1.0f - a.smoothing) * (s.top - one(chosen)) : __builtin_nanf("");
        if (Smoothed) below[r] += a.smoothing * (s.top - s.plain * inverse);
    });
}

// Calls `body<smoothed, type>()` for what the logits are.
template <class Body>
inline void with_type(const CrossEntropyFwd& a, Body body) {
    const auto typed = [&](auto smoothed) {
        if (a.dtype == DType::f32) body(smoothed, float{});
        if (a.dtype == DType::f16) body(smoothed, half{});
        if (a.dtype == DType::bf16) body(smoothed, bfloat{});
    };
    a.smoothing > 0 ? typed(Bool<true>{}) : typed(Bool<false>{});
}

int64_t counted_targets(const int64_t* targets, int64_t rows, int64_t ignore_index) {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) count += targets[r] != ignore_index;
    return count;
}

float denominator_of(const float* given, const int64_t* targets, int64_t rows, int64_t ignore_index) {
    if (given) return *given;
    const int64_t count = counted_targets(targets, rows, ignore_index);
    return count ? static_cast<float>(count) : 1.0f;
}

}  // namespace

bool cross_entropy_fwd(const CrossEntropyFwd& a) {
    double total = 0.0;
    if (a.state) {
        State* state = static_cast<State*>(a.state);
        if (a.cols)
            with_type(a, [&](auto smoothed, auto type) { add_columns<smoothed.value, decltype(type)>(a, state); });
        if (a.loss == nullptr) return true;
        for (int64_t r = 0; r < a.rows; ++r) {
            const int64_t target = a.targets[r];
            a.lse[r] = static_cast<float>(state[r].lse);
            if (target == a.ignore_index) continue;
            total += target >= 0 && target < a.classes ? state[r].lse + state[r].rest : __builtin_nan("");
        }
    } else {
        const int64_t room = (a.rows + W - 1) / W * W;
        float* top = cpu::workspace(3 * room + 1);
        if (top == nullptr) return false;
        float* sum = top + room;
        float* below = sum + room;
        with_type(
            a, [&](auto smoothed, auto type) { add_whole_rows<smoothed.value, decltype(type)>(a, top, sum, below); });
        for (int64_t r = 0; r < a.rows; r += W) {
            const vf logs = log(load(sum + r));
            for (int64_t i = 0; i < W && r + i < a.rows; ++i) {
                a.lse[r + i] = lse_of(top[r + i], logs[i], sum[r + i]);
                if (a.targets[r + i] != a.ignore_index) total += static_cast<double>(below[r + i]) + logs[i];
            }
        }
    }
    *a.loss = static_cast<float>(total / denominator_of(a.denominator, a.targets, a.rows, a.ignore_index));
    return true;
}

namespace {

// e^x for x <= 0, or a little above; 0 below e^-87. NaN stays NaN.
template <int N>
inline void exp_or_zero(vf (&x)[N]) {
    vf y[N];
    for (int k = 0; k < N; ++k) y[k] = x[k];
    exp_within(y);
    for (int k = 0; k < N; ++k) x[k] = choose(x[k] < splat(kExpLow), vf{}, y[k]);
}

template <class T>
inline void backward_row(const CrossEntropyBwd& a, const Edge& edge, int64_t r, float factor) {
    const T* z = static_cast<const T*>(a.logits) + r * a.stride;
    T* dz = static_cast<T*>(a.dlogits) + r * a.dlogits_stride;
    const int64_t n = a.vocab, target = a.targets[r] - a.first;
    const bool here = target >= 0 && target < n;
    const vf lse = splat(a.lse[r]), scale = splat(factor), level = splat(a.smoothing / a.classes * factor);
    const auto gradient = [&](vf x) {
        vf p[1] = {x - lse};
        exp_or_zero(p);
        return p[0] * scale - level;
    };
    const vf chosen = here ? splat(one(z + target)) : vf{};
    const int64_t whole = edge.whole;
    const vf last = whole < n ? gradient(load_edge(z, n)) : vf{};
    int64_t c = 0;
    for (; c + 2 * W <= whole; c += 2 * W) {
        vf p[2] = {load(z + c) - lse, load(z + c + W) - lse};
        exp_or_zero(p);
        store(dz + c, p[0] * scale - level);
        store(dz + c + W, p[1] * scale - level);
    }
    if (c < whole) store(dz + c, gradient(load(z + c)));
    if (whole < n) n >= W ? store(dz + n - W, last) : store_first(dz, last, n);
    // With the target's own p before it is rounded to 16 bits: p - 1 is what is left when both are nearly equal.
    if (here) store_first(dz + target, gradient(chosen) - splat((1.0f - a.smoothing) * factor), 1);
    if (n < a.cols) std::memset(dz + n, 0, (a.cols - n) * sizeof(T));
}

template <class T>
void backward(const CrossEntropyBwd& a) {
    const Edge edge = edge_of(a.vocab);
    const float factor = *a.dloss / denominator_of(a.denominator, a.targets, a.rows, a.ignore_index);
    [[maybe_unused]] const int threads = cpu::thread_count(a.rows, a.rows * a.cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < a.rows; ++r) {
        if (a.targets[r] == a.ignore_index)
            std::memset(static_cast<T*>(a.dlogits) + r * a.dlogits_stride, 0, a.cols * sizeof(T));
        else
            backward_row<T>(a, edge, r, factor);
    }
}

}  // namespace

bool cross_entropy_bwd(const CrossEntropyBwd& a) {
    if (a.dtype == DType::f32) backward<float>(a);
    if (a.dtype == DType::f16) backward<half>(a);
    if (a.dtype == DType::bf16) backward<bfloat>(a);
    return true;
}

}  // namespace tinygpt::TINYGPT_ISA
