// Attention, backward, for one instruction set. With weights P = exp(q kᵀ scale - lse), computed again from the saved
// lse, and dropout's mask M (1 / (1 - p) or 0):
//     dv = (P M)ᵀ dy,    dP = (dy vᵀ) M,    dS = P (dP - delta) with delta = rowsum(dy y),    dq = dS k scale,
//     dk = dSᵀ q scale
// (Dao et al. 2022, "FlashAttention", section B.4; that delta needs only the output is what makes it cheap.)
//
// A task is one key/value head of one batch row, all query heads of its group included: nobody else writes its dk and
// dv, and the sums are taken in one order whatever the number of threads. Keys go in blocks, whose dk and dv stay in
// the second-level cache; within one, queries go in blocks as in the forward. dq adds up over the blocks of keys: in
// the output itself where that is float32, else in a float32 buffer. Memory is linear in T and S.
//
// Left out: dividing one head among threads. It would need partial dk and dv in a number that must not depend on the
// threads.

#include "attention.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

using cpu::workspace;

// Rows of a block of queries whose scores are made and used while they stay in the first-level cache.
constexpr int64_t kStripe = 24 / kRows * kRows;

struct BackwardSizes {
    int64_t rows;    // queries per block, whole tiles
    int64_t blocks;  // blocks of queries per head
    int64_t keys;    // keys per block
    int64_t pitch, score_pitch, sum_pitch;
    bool sums_dq;  // dq needs float32 sums beside the output

    explicit BackwardSizes(const AttentionBwd& a) {
        const int64_t limit = a.D <= 32 ? 96 : 48;
        blocks = most(1, (a.T + limit - 1) / limit);
        rows = round_up((a.T + blocks - 1) / blocks, kRows);
        const int64_t fitting = most(64, least(384, 12288 / a.D)) / kCols * kCols;
        keys = least(fitting, round_up(a.S, kCols));
        pitch = row_pitch(a.D);
        score_pitch = row_pitch(keys + 2 * kRows + W);
        sum_pitch = round_up(a.D, W);
        sums_dq = a.dtype != DType::f32 && a.S > keys && a.dq.data != nullptr;
    }
    int64_t floats(const AttentionBwd& a) const {
        const int64_t queries = a.H / a.K * a.T;
        return 2 * keys * a.D + (3 * keys + 2 * kRows + 3 * rows) * pitch + 2 * rows * score_pitch + queries + W +
               (sums_dq ? queries * sum_pitch : 0) + keys + 64 + kCols * round_up(a.D, W);
    }
};

// One row against a block of keys: scores become weights P (times the mask), dP becomes dS; zeros to 2 kRows beyond.
template <bool kDropout>
inline void differentiate(float* score, float* grad, int64_t n, float lse, float delta, const float* kept, float grow) {
    const vf shift = splat(lse), level = splat(delta), factor = splat(grow);
    auto both = [&](int64_t s, vf& p, vf& ds) {
        p = exp_below(load(score + s) - shift);
        if constexpr (kDropout) {
            const vf mask = load(kept + s) * factor;
            ds = p * (load(grad + s) * mask - level);
            p = p * mask;
        } else {
            ds = p * (load(grad + s) - level);
        }
    };
    int64_t s = 0;
    vf p, ds;
    for (; s + W <= n; s += W) {
        both(s, p, ds);
        store(score + s, p);
        store(grad + s, ds);
    }
    if (s < n) {
        both(s, p, ds);
        store(score + s, keep(p, n - s));
        store(grad + s, keep(ds, n - s));
        s += W;
    }
    for (const int64_t end = n + 2 * kRows; s < end; s += W) {
        store(score + s, vf{});
        store(grad + s, vf{});
    }
}

template <class T>
inline void add_row(const float* source, int64_t D, float factor, T* target) {
    const vf by = splat(factor);
    int64_t d = 0;
    for (; d + W <= D; d += W) store(target + d, load(target + d) + load(source + d) * by);
    if (d < D) store_first(target + d, load_first(target + d, D - d) + load(source + d) * by, D - d);
}

template <class T>
struct BackwardHead {
    const AttentionBwd& a;
    const BackwardSizes& z;
    const int64_t b, kv;
    const Sight sight;
    int64_t touched;  // keys of this block whose sums have begun
    float *keys, *values, *key_rows, *dk, *dv, *q, *dy, *dq, *scores, *grads, *delta, *dq_sums, *kept, *spare;

    BackwardHead(const AttentionBwd& a, const BackwardSizes& z, int64_t b, int64_t kv, float* memory)
        : a(a), z(z), b(b), kv(kv), sight(a, b) {
        auto take = [&](int64_t n) {
            float* mine = memory;
            memory += n;
            return mine;
        };
        const int64_t queries = a.H / a.K * a.T;
        key_rows = take(z.keys * z.pitch);
        dk = take((z.keys + kRows) * z.pitch);
        dv = take((z.keys + kRows) * z.pitch);
        q = take(z.rows * z.pitch);
        dy = take(z.rows * z.pitch);
        dq = take(z.rows * z.pitch);
        scores = take(z.rows * z.score_pitch);
        grads = take(z.rows * z.score_pitch);
        keys = take(z.keys * a.D);
        values = take(z.keys * a.D);
        kept = take(z.keys + 64);
        spare = take(kCols * round_up(a.D, W));
        delta = take(queries + W);
        dq_sums = z.sums_dq ? take(queries * z.sum_pitch) : nullptr;
    }

    // Packs n rows of dy; with the first block of keys, their delta too.
    void pack_dy(int64_t g, int64_t t, int64_t n, bool with_delta) {
        const int64_t h = kv * (a.H / a.K) + g;
        if (!with_delta) return pack_rows(at<T>(a.dy, b, t, h), a.dy.token, n, a.D, 1.0f, dy, z.pitch);
        for (int64_t first = 0; first < n; first += 4) {
            const int count = static_cast<int>(least(4, n - first));
            vf part[4] = {};
            for (int i = 0; i < count; ++i) {
                const T *grad = at<T>(a.dy, b, t + first + i, h), *y = at<T>(a.y, b, t + first + i, h);
                float* own = dy + (first + i) * z.pitch;
                int64_t d = 0;
                for (; d + W <= a.D; d += W) {
                    const vf x = load(grad + d);
                    store(own + d, x);
                    part[i] += x * load(y + d);
                }
                if (d < a.D) {
                    const vf x = load_first(grad + d, a.D - d);
                    store(own + d, x);
                    part[i] += x * load_first(y + d, a.D - d);
                }
            }
            const v4 total = sums(part);
            for (int i = 0; i < count; ++i) delta[g * a.T + t + first + i] = total[i];
        }
    }

    void put_dq(int64_t g, int64_t t, int64_t n, bool add) {
        for (int64_t i = 0; i < n; ++i) {
            const float* own = dq + i * z.pitch;
            if (dq_sums) {
                float* sum = dq_sums + (g * a.T + t + i) * z.sum_pitch;
                add ? add_row(own, a.D, a.scale, sum) : unpack_row(own, a.D, a.scale, sum);
            } else {
                T* target = at<T>(a.dq, b, t + i, kv * (a.H / a.K) + g);
                add ? add_row(own, a.D, a.scale, target) : unpack_row(own, a.D, a.scale, target);
            }
        }
    }

    // Queries t to t + n of the group's head g against keys s to s + cols, of which the last query sees `cols`.
    void queries(int64_t g, int64_t t, int64_t n, int64_t s, int64_t cols) {
        const int64_t h = kv * (a.H / a.K) + g;
        pack_rows(at<T>(a.q, b, t, h), a.q.token, n, a.D, a.scale, q, z.pitch);
        pack_dy(g, t, n, s == 0);
        auto seen = [&](int64_t i) { return most(0, least(cols, sight.keys(t + i) - s)); };
        auto seen_by_tile = [&](int64_t i) { return seen(least(i + kRows, n) - 1); };
        const float* lse = a.lse + (b * a.H + h) * a.T + t;
        for (int64_t first = 0; first < n; first += kStripe) {
            const int64_t end = least(first + kStripe, n), most_seen = seen(end - 1);
            for (int64_t c = 0; c < most_seen; c += kCols)
                for (int64_t i = first; i < end; i += kRows)
                    if (seen_by_tile(i) > c) {
                        multiply<false>(q + i * z.pitch, z.pitch, keys + c * a.D, kCols, a.D,
                                        scores + i * z.score_pitch + c, z.score_pitch, false);
                        multiply<false>(dy + i * z.pitch, z.pitch, values + c * a.D, kCols, a.D,
                                        grads + i * z.score_pitch + c, z.score_pitch, false);
                    }
            for (int64_t i = first; i < end; ++i) {
                float *score = scores + i * z.score_pitch, *grad = grads + i * z.score_pitch;
                const float level = delta[g * a.T + t + i];
                if (a.seed) {
                    if (seen(i)) keep_row(a, b * a.H + h, t + i, s, seen(i), kept);
                    differentiate<true>(score, grad, seen(i), lse[i], level, kept, a.inverse_keep);
                } else {
                    differentiate<false>(score, grad, seen(i), lse[i], level, nullptr, 1.0f);
                }
            }
            if (a.dq.data)
                for (int64_t c = 0; c < a.D; c += kCols)
                    for (int64_t i = first; i < end; i += kRows)
                        multiply<false>(grads + i * z.score_pitch, z.score_pitch, key_rows + c, z.pitch,
                                        seen_by_tile(i), dq + i * z.pitch + c, z.pitch, false);
        }
        if (a.dq.data) put_dq(g, t, n, s > 0);
        for (int64_t c = 0; c < cols; c += kRows) {
            const int64_t first = most(0, sight.first_query(s + c) - t), depth = n - first;
            for (int64_t d = 0; d < a.D; d += kCols) {
                if (a.dv.data)
                    multiply<true>(scores + first * z.score_pitch + c, z.score_pitch, dy + first * z.pitch + d, z.pitch,
                                   depth, dv + c * z.pitch + d, z.pitch, c < touched);
                if (a.dk.data)
                    multiply<true>(grads + first * z.score_pitch + c, z.score_pitch, q + first * z.pitch + d, z.pitch,
                                   depth, dk + c * z.pitch + d, z.pitch, c < touched);
            }
        }
        touched = most(touched, cols);
    }

    void run() {
        const int64_t group = a.H / a.K;
        for (int64_t s = 0; s < sight.valid; s += z.keys) {
            const int64_t cols = least(z.keys, sight.valid - s);
            pack_rows(at<T>(a.k, b, s, kv), a.k.token, cols, a.D, 1.0f, key_rows, z.pitch);
            pack_panels(key_rows, z.pitch, cols, a.D, keys);
            pack_panels_from(at<T>(a.v, b, s, kv), a.v.token, cols, a.D, values, spare);
            touched = 0;
            for (int64_t g = 0; g < group; ++g)
                for (int64_t t = 0; t < a.T; t += z.rows) {
                    const int64_t n = least(z.rows, a.T - t), end = sight.keys(t + n - 1);
                    if (end > s) {
                        queries(g, t, n, s, least(cols, end - s));
                    } else if (s == 0 && a.dq.data) {
                        std::memset(dq, 0, n * z.pitch * sizeof(float));
                        put_dq(g, t, n, false);
                    }
                }
            if (touched == 0)  // there are no queries
                std::memset(dk, 0, cols * z.pitch * sizeof(float)), std::memset(dv, 0, cols * z.pitch * sizeof(float));
            for (int64_t i = 0; i < cols; ++i) {
                if (a.dk.data) unpack_row(dk + i * z.pitch, a.D, 1.0f, at<T>(a.dk, b, s + i, kv));
                if (a.dv.data) unpack_row(dv + i * z.pitch, a.D, 1.0f, at<T>(a.dv, b, s + i, kv));
            }
        }
        for (int64_t s = sight.valid; s < a.S; ++s) {
            if (a.dk.data) std::memset(at<T>(a.dk, b, s, kv), 0, a.D * sizeof(T));
            if (a.dv.data) std::memset(at<T>(a.dv, b, s, kv), 0, a.D * sizeof(T));
        }
        if (!a.dq.data || (sight.valid > 0 && !dq_sums)) return;
        for (int64_t g = 0; g < group; ++g)
            for (int64_t t = 0; t < a.T; ++t) {
                T* target = at<T>(a.dq, b, t, kv * group + g);
                if (sight.valid == 0)
                    std::memset(target, 0, a.D * sizeof(T));
                else
                    unpack_row(dq_sums + (g * a.T + t) * z.sum_pitch, a.D, 1.0f, target);
            }
    }
};

template <class T>
bool backward(const AttentionBwd& a) {
    const BackwardSizes z(a);
    const int64_t heads = a.B * a.K;
    [[maybe_unused]] const int threads = cpu::thread_count(heads, a.B * a.H * a.T * a.S / 4 * a.D);
    bool memory_for_all = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* memory = workspace(z.floats(a));
        if (memory == nullptr) {
#pragma omp atomic write
            memory_for_all = false;
        }
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < heads; ++head)
            if (memory != nullptr) BackwardHead<T>(a, z, head / a.K, head % a.K, memory).run();
    }
    return memory_for_all;
}

}  // namespace

bool attention_bwd(const AttentionBwd& a) {
    if (a.dtype == DType::f32) return backward<float>(a);
    return a.dtype == DType::f16 ? backward<half>(a) : backward<bfloat>(a);
}

}  // namespace tinygpt::TINYGPT_ISA
