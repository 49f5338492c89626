// Attention, forward, for one instruction set: softmax(q kᵀ scale) v.
//
// A task is one key/value head of one batch row: its keys and values are packed once, as floats, into the thread's
// workspace, and serve every query head of the group. Queries go in blocks of some tens of rows. Per block and per
// block of keys: a product gives the scores, rows become weights in place, a product with the values adds to the
// block's result. Weights are relative to the largest score so far; where a later block of keys raises it, what was
// added up shrinks by the difference (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao
// 2022, "FlashAttention"). So memory is linear in T and S, scores stay in the second-level cache, and keys that
// causality hides are not computed but for the rest of a tile.
//
// Saved: lse = log sum exp of the scores, which is all that the backward needs to compute any weight again.
//
// Results do not depend on the number of threads: a thread computes whole blocks, and how many heads or blocks it gets
// changes nothing in them.

#include "attention.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

using cpu::workspace;

constexpr int64_t kKeys = 256;  // keys per block: scores of a block of queries stay in the second-level cache

struct ForwardSizes {
    int64_t rows;    // queries per block, whole tiles
    int64_t blocks;  // blocks of queries per head
    int64_t keys;    // keys per block
    int64_t pitch, score_pitch;

    explicit ForwardSizes(const Attention& a) {
        const int64_t limit = a.D <= 32 ? 96 : 48;
        blocks = most(1, (a.T + limit - 1) / limit);
        rows = round_up((a.T + blocks - 1) / blocks, kRows);
        keys = least(kKeys, round_up(a.S, kCols));
        pitch = row_pitch(a.D);
        score_pitch = row_pitch(keys + 2 * kRows + W);
    }
    int64_t floats(const Attention& a) const {
        return round_up(a.S, kCols) * a.D + a.S * pitch + rows * (2 * pitch + score_pitch) + 2 * round_up(rows, W) +
               kCols * round_up(a.D, W) + kKeys + 64;
    }
};

// Turns a row's scores of one block of keys into weights relative to the largest of them, and zeros to 2 kRows beyond.
// Returns the vector of sums.
template <bool kDropout>
inline vf weigh(float* row, int64_t n, float top, const float* kept) {
    const vf shift = splat(top);
    vf total[2] = {};
    int64_t s = 0;
    for (; s + 2 * W <= n; s += 2 * W)
        for (int j = 0; j < 2; ++j) {
            const vf p = exp_below(load(row + s + j * W) - shift);
            total[j] += p;
            store(row + s + j * W, kDropout ? p * load(kept + s + j * W) : p);
        }
    for (; s < n; s += W) {
        const vf p = keep(exp_below(load(row + s) - shift), least(n - s, W));
        total[0] += p;
        store(row + s, kDropout ? p * load(kept + s) : p);
    }
    for (const int64_t end = n + 2 * kRows; s < end; s += W) store(row + s, vf{});
    return total[0] + total[1];
}

inline vf largest(const float* row, int64_t n) {
    const vf low = splat(-__builtin_inff());
    vf top[2] = {low, low};
    int64_t s = 0;
    for (; s + 2 * W <= n; s += 2 * W)
        for (int j = 0; j < 2; ++j) top[j] = larger(top[j], load(row + s + j * W));
    for (; s + W <= n; s += W) top[0] = larger(top[0], load(row + s));
    if (s < n) {
        vi lane;
        for (int i = 0; i < W; ++i) lane[i] = i;
        const vi seen = lane < vi{} + static_cast<int32_t>(n - s);
        top[1] = larger(top[1], bits_as<vf>(select(seen, bits_as<vu>(load(row + s)), bits_as<vu>(low))));
    }
    return larger(top[0], top[1]);
}

// Queries t to t + n of query head h against the packed keys and values.
template <class T>
struct ForwardBlock {
    const AttentionFwd& a;
    const ForwardSizes& z;
    const Sight& sight;
    float *keys, *values, *q, *result, *scores, *top, *sum, *kept;

    ForwardBlock(const AttentionFwd& a, const ForwardSizes& z, const Sight& sight, float* memory)
        : a(a), z(z), sight(sight) {
        auto take = [&](int64_t n) {
            float* mine = memory;
            memory += n;
            return mine;
        };
        keys = take(round_up(a.S, kCols) * a.D);
        values = take(a.S * z.pitch);
        q = take(z.rows * z.pitch);
        result = take(z.rows * z.pitch);
        scores = take(z.rows * z.score_pitch);
        top = take(round_up(z.rows, W));
        sum = take(round_up(z.rows, W));
        kept = take(kKeys + 64);
    }

    void pack(int64_t b, int64_t kv) {  // `memory` beyond all else holds kCols rows while 16-bit keys are transposed
        pack_panels_from(at<T>(a.k, b, 0, kv), a.k.token, sight.valid, a.D, keys, kept + kKeys + 64);
        pack_rows(at<T>(a.v, b, 0, kv), a.v.token, sight.valid, a.D, 1.0f, values, z.pitch);
    }

    template <bool kDropout>
    void softmax(int64_t t, int64_t n, int64_t s, int64_t cols, int64_t head) {
        for (int64_t first = 0; first < n; first += 4) {
            const int count = static_cast<int>(least(4, n - first));
            float* row = scores + first * z.score_pitch;
            int64_t seen[4] = {};
            vf part[4] = {};
            for (int i = 0; i < count; ++i) {
                seen[i] = most(0, least(cols, sight.keys(t + first + i) - s));
                part[i] = largest(row + i * z.score_pitch, seen[i]);
            }
            const v4 highest = tops(part);
            for (int i = 0; i < count; ++i) {
                float& was = top[first + i];
                const float now = highest[i] < was ? was : highest[i];
                if (kDropout && seen[i]) keep_row(a, head, t + first + i, s, seen[i], kept);
                part[i] = weigh<kDropout>(row + i * z.score_pitch, seen[i], now, kept);
                if (s > 0 && now != was) {
                    const vf shrink = exp_below(splat(was - now));
                    sum[first + i] *= shrink[0];
                    float* own = result + (first + i) * z.pitch;
                    for (int64_t d = 0; d < a.D; d += W) store(own + d, load(own + d) * shrink);
                }
                was = now;
            }
            const v4 totals = sums(part);
            for (int i = 0; i < count; ++i) sum[first + i] += totals[i];
        }
    }

    void run(int64_t b, int64_t h, int64_t block) {
        const int64_t t = block * z.rows, n = least(z.rows, a.T - t), head = b * a.H + h;
        const int64_t end = sight.keys(t + n - 1);
        if (n <= 0) return;
        pack_rows(at<T>(a.q, b, t, h), a.q.token, n, a.D, a.scale, q, z.pitch);
        for (int64_t i = 0; i < n; ++i) {
            top[i] = -__builtin_inff();
            sum[i] = 0.0f;
        }
        for (int64_t s = 0; s < end; s += z.keys) {
            const int64_t cols = least(z.keys, end - s);
            for (int64_t c = 0; c < cols; c += kCols)
                for (int64_t i = 0; i < n; i += kRows)
                    if (sight.keys(t + least(i + kRows, n) - 1) > s + c)
                        multiply<false>(q + i * z.pitch, z.pitch, keys + (s + c) * a.D, kCols, a.D,
                                        scores + i * z.score_pitch + c, z.score_pitch, false);
            a.seed ? softmax<true>(t, n, s, cols, head) : softmax<false>(t, n, s, cols, head);
            for (int64_t c = 0; c < a.D; c += kCols)
                for (int64_t i = 0; i < n; i += kRows) {
                    const int64_t depth = least(cols, sight.keys(t + least(i + kRows, n) - 1) - s);
                    if (depth > 0)
                        multiply<false>(scores + i * z.score_pitch, z.score_pitch, values + s * z.pitch + c, z.pitch,
                                        depth, result + i * z.pitch + c, z.pitch, s > 0);
                }
        }
        for (int64_t i = 0; i < n; i += W) store(kept + i, log_of(load(sum + i)));
        T* y = static_cast<T*>(a.y) + ((b * a.T + t) * a.H + h) * a.D;
        for (int64_t i = 0; i < n; ++i, y += a.H * a.D) {
            float* own = result + i * z.pitch;
            const bool sighted = sight.keys(t + i) > 0;
            if (!sighted) std::memset(own, 0, z.pitch * sizeof(float));
            unpack_row(own, a.D, sighted ? (a.seed ? a.inverse_keep : 1.0f) / sum[i] : 0.0f, y);
            a.lse[head * a.T + t + i] = sighted ? top[i] + kept[i] : -__builtin_inff();
        }
    }
};

template <class T>
bool forward(const AttentionFwd& a) {
    const ForwardSizes z(a);
    const int64_t heads = a.B * a.K, group = a.H / a.K, items = group * z.blocks;
    const int threads = cpu::thread_count(heads * items, a.B * a.H * a.T * a.S / 8 * a.D);
    // Where heads do not go evenly among threads, parts of a head's blocks do; each packs the head's keys again.
    const int64_t parts =
        heads % threads == 0 || heads >= 4 * threads ? 1 : least(items, (4 * threads + heads - 1) / heads);
    bool memory_for_all = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* memory = workspace(z.floats(a));
        if (memory == nullptr) {
#pragma omp atomic write
            memory_for_all = false;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * parts; ++task) {
            if (memory == nullptr) continue;
            const int64_t b = task % heads / a.K, kv = task % a.K,
                          part = parts - 1 - task / heads;  // the longest rows first
            const Sight sight(a, b);
            ForwardBlock<T> block(a, z, sight, memory);
            block.pack(b, kv);
            for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item)
                block.run(b, kv * group + item % group, item / group);
        }
    }
    return memory_for_all;
}

}  // namespace

bool attention_fwd(const AttentionFwd& a) {
    if (a.dtype == DType::f32) return forward<float>(a);
    return a.dtype == DType::f16 ? forward<half>(a) : forward<bfloat>(a);
}

}  // namespace tinygpt::TINYGPT_ISA
