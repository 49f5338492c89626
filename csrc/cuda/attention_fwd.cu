// Attention, forward: softmax(q kᵀ scale) v.
//
// A block takes a tile of queries of one head, and goes through the keys that they see in tiles. Weights are relative
// to a reference of each row; where a later tile holds a larger score, what was added up shrinks by the difference
// (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention"). Saved:
// lse = log sum exp of the scores.
//
// Two-byte types: a warp has 16 M queries for itself, scores and results in registers. The next tile of keys and values
// arrives (cp.async) while this one is worked on: one barrier a tile. Scores are in powers of two. The reference moves
// only when a row's largest score has outgrown it by 2^8: weights up to 256 cost no accuracy, and results are rarely
// scaled.
//
// float32: products by FFMA, no tensor cores (TF32 would lose 13 bits). Scores are in powers of e: log2(e) times a
// large score would be one rounding more than the definition has.
//
// Tiles that no mask crosses, and those that one does, run different code. Blocks with the most keys start first.

#include "attention.cuh"

namespace tinygpt::cuda {
namespace {

constexpr float kSlack = 8.0f;
constexpr float kInfinity = INFINITY;

// As much as registers hold: dropout needs some of its own.
template <int D, bool DROPOUT>
struct ForwardTiles {
    static constexpr int M = DROPOUT && D == 128 ? 1 : 2;  // 16 M queries for each warp
    static constexpr int kQueries = 16 * M * kWarps;       // of a block
    static constexpr int kKeys = D <= 64 && !DROPOUT ? 64 : 32;
    static constexpr bool kHeld = M * D <= 128;  // the queries stay in registers
    static constexpr int kBytes = (kQueries + 4 * kKeys) * D * 2;
};

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, kResident) forward(AttentionFwd a) {
    using Tiles = ForwardTiles<D, DROPOUT>;
    constexpr int M = Tiles::M, N = Tiles::kKeys / 8, kQueries = Tiles::kQueries, kKeys = Tiles::kKeys;
    const int H = static_cast<int>(a.H), b = blockIdx.x / H, h = blockIdx.x % H, kv = h / static_cast<int>(a.H / a.K);
    const int first = (gridDim.y - 1 - blockIdx.y) * kQueries, rows = least(kQueries, static_cast<int>(a.T) - first);
    const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 * M;
    const Sight sight(a, b);
    const Dropout dropout(a, blockIdx.x);
    const int all_see = sight.keys(first) / kKeys * kKeys, end = sight.keys(first + rows - 1);

    simt::SharedMemory memory;
    T* q = memory.take<T>(kQueries * D);
    T* keys = memory.take<T>(2 * kKeys * D);
    T* values = memory.take<T>(2 * kKeys * D);
    const auto fetch_keys = [&](int s) {
        const int stage = s / kKeys % 2 * kKeys * D;
        fetch<D, kKeys>(keys + stage, at<T>(a.k, b, s, kv), a.k.token, sight.valid - s);
        fetch<D, kKeys>(values + stage, at<T>(a.v, b, s, kv), a.v.token, sight.valid - s);
        simt::cp_async_commit();
    };
    if (end > 0) {
        fetch<D, kQueries>(q, at<T>(a.q, b, first, h), a.q.token, rows);
        fetch_keys(0);
    }

    // The largest score is looked for before scaling, so the scale must be positive: q takes its sign. Not quite 0,
    // for what is hidden, -inf, to stay so.
    const float scale = fmaxf(fabsf(a.scale) * kLog2E, 1e-30f);
    const auto negate_own = [&] {
        uint32_t* pairs = reinterpret_cast<uint32_t*>(q + row * D);
        for (int i = 4 * lane; i < 16 * M * D / 2; i += 4 * kWarp) {
            auto v = simt::load<uint32_t, 4>(pairs + i);
            for (int e = 0; e < 4; ++e) v.at[e] ^= 0x80008000u;
            simt::store<uint32_t, 4>(pairs + i, v);
        }
        __syncwarp();
    };
    uint32_t held[Tiles::kHeld ? D / 16 : 1][M][4];
    const auto left = [&](uint32_t (&f)[4], int m, int step) {
        if constexpr (Tiles::kHeld) {
#pragma unroll
            for (int i = 0; i < 4; ++i) f[i] = held[step][m][i];
        } else {
            left_operand<D>(f, q, row + 16 * m, step);
        }
    };

    float result[M][D / 8][4] = {}, sum[M][2] = {}, reference[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) reference[m][0] = reference[m][1] = -kInfinity;

    const auto work = [&](int s, auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        const int stage = s / kKeys % 2 * kKeys * D;
        float p[M][N][4] = {};
        multiply_rows<D>(p, left, keys + stage);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if constexpr (kMasked) {
                    const int seen = sight.keys(first + row + 16 * m + 8 * r + lane / 4) - s - lane % 4 * 2;
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            if (8 * n + i >= seen) p[m][n][2 * r + i] = -kInfinity;
                }
                float top = -kInfinity;
#pragma unroll
                for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(p[m][n][2 * r], p[m][n][2 * r + 1]));
                top = fmaxf(top, __shfl_xor_sync(simt::kWholeWarp, top, 1));
                top = fmaxf(top, __shfl_xor_sync(simt::kWholeWarp, top, 2)) * scale;
                if (top > reference[m][r] + kSlack) {
                    const float shrink = simt::exp2_fast(reference[m][r] - top);
                    reference[m][r] = top;
                    sum[m][r] *= shrink;
#pragma unroll
                    for (int d = 0; d < D / 8; ++d) {
                        result[m][d][2 * r] *= shrink;
                        result[m][d][2 * r + 1] *= shrink;
                    }
                }
                const float base = kMasked && reference[m][r] == -kInfinity ? 0.0f : reference[m][r];
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        p[m][n][2 * r + i] = simt::exp2_fast(p[m][n][2 * r + i] * scale - base);
                        sum[m][r] += p[m][n][2 * r + i];
                    }
            }
        if constexpr (DROPOUT) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const unsigned kept = dropout.of_queries(first + row + 16 * m, s + 8 * n);
#pragma unroll
                    for (int i = 0; i < 4; ++i) p[m][n][i] = kept >> i & 1 ? p[m][n][i] : 0.0f;
                }
        }
        multiply_columns<D>(result, p, values + stage);
    };

    for (int s = 0; s < end; s += kKeys) {
        simt::cp_async_wait<0>();
        __syncthreads();  // this tile is there, and the one before it is done with
        if (s + kKeys < end) fetch_keys(s + kKeys);
        if (s == 0) {
            if (a.scale < 0.0f) negate_own();
            if constexpr (Tiles::kHeld) {
#pragma unroll
                for (int step = 0; step < D / 16; ++step)
#pragma unroll
                    for (int m = 0; m < M; ++m) left_operand<D>(held[step][m], q, row + 16 * m, step);
            }
        }
        if (s < all_see)
            work(s, std::false_type());
        else
            work(s, std::true_type());
    }

#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float total = sum[m][r];
            total += __shfl_xor_sync(simt::kWholeWarp, total, 1);
            total += __shfl_xor_sync(simt::kWholeWarp, total, 2);
            const int at_row = row + 16 * m + 8 * r + lane / 4;
            const bool sighted = sight.keys(first + at_row) > 0;
            const float factor = sighted ? (DROPOUT ? a.inverse_keep : 1.0f) / total : 0.0f;
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                result[m][d][2 * r] *= factor;
                result[m][d][2 * r + 1] *= factor;
            }
            if (at_row < rows && lane % 4 == 0)
                a.lse[blockIdx.x * a.T + first + at_row] = sighted ? reference[m][r] * kLn2 + logf(total) : -kInfinity;
        }
    T* y = static_cast<T*>(a.y) + ((b * a.T + first + row) * a.H + h) * D;
    put_rows<D>(result, q, row, y, a.H * D, rows - row, rows - row);
}

template <int D>
struct FloatTiles {
    static constexpr int M = 4, N = 4, kQueries = M * kDown, kKeys = N * kAcross;
    static constexpr int kBytes = 4 * ((kQueries + kKeys) * kPitch<D> + kQueries * kScores<kKeys>);
};

template <int D, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, kResident) forward_float(AttentionFwd a) {
    using Tiles = FloatTiles<D>;
    constexpr int M = Tiles::M, N = Tiles::N, kQueries = Tiles::kQueries, kKeys = Tiles::kKeys;
    const int H = static_cast<int>(a.H), b = blockIdx.x / H, h = blockIdx.x % H, kv = h / static_cast<int>(a.H / a.K);
    const int first = (gridDim.y - 1 - blockIdx.y) * kQueries, rows = least(kQueries, static_cast<int>(a.T) - first);
    const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
    const Sight sight(a, b);
    const Dropout dropout(a, blockIdx.x);
    const int all_see = sight.keys(first), end = sight.keys(first + rows - 1);
    const float *k = at<float>(a.k, b, 0, kv), *v = at<float>(a.v, b, 0, kv);

    simt::SharedMemory memory;
    float* q = memory.take<float>(kQueries * kPitch<D>);
    float* tile = memory.take<float>(kKeys * kPitch<D>);  // keys, then values
    float* weights = memory.take<float>(kQueries * kScores<kKeys>);
    if (end > 0) copy_rows<D, kQueries>(q, at<float>(a.q, b, first, h), a.q.token, rows);

    float result[M][D / 32][4] = {}, sum[M] = {}, reference[M];
#pragma unroll
    for (int i = 0; i < M; ++i) reference[i] = -kInfinity;
    for (int s = 0; s < end; s += kKeys) {
        __syncthreads();  // the values before are done with
        copy_rows<D, kKeys>(tile, k + s * a.k.token, a.k.token, sight.valid - s);
        __syncthreads();
        float p[M][N];
        multiply_rows<D>(p, q, tile);
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) p[i][j] *= a.scale;
        if (s + kKeys > all_see) {
#pragma unroll
            for (int i = 0; i < M; ++i) {
                const int seen = sight.keys(first + down + kDown * i) - s;
#pragma unroll
                for (int j = 0; j < N; ++j)
                    if (across + kAcross * j >= seen) p[i][j] = -kInfinity;
            }
        }
#pragma unroll
        for (int i = 0; i < M; ++i) {
            float top = p[i][0];
#pragma unroll
            for (int j = 1; j < N; ++j) top = fmaxf(top, p[i][j]);
            top = fmaxf(reference[i], row_top(top));
            const float base = top == -kInfinity ? 0.0f : top, shrink = expf(reference[i] - base);
            reference[i] = top;
            sum[i] *= shrink;
#pragma unroll
            for (int d = 0; d < D / 32; ++d)
#pragma unroll
                for (int e = 0; e < 4; ++e) result[i][d][e] *= shrink;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                float weight = expf(p[i][j] - base);
                sum[i] += weight;
                if constexpr (DROPOUT)
                    if (!dropout.keeps(first + down + kDown * i, s + across + kAcross * j)) weight = 0.0f;
                weights[(down + kDown * i) * kScores<kKeys> + across + kAcross * j] = weight;
            }
        }
        __syncthreads();  // the keys are done with, and a warp's weights are there for all of it
        copy_rows<D, kKeys>(tile, v + s * a.v.token, a.v.token, sight.valid - s);
        __syncthreads();
        multiply_columns<D, M, N>(result, weights, tile);
    }

#pragma unroll
    for (int i = 0; i < M; ++i) {
        const int row = down + kDown * i;
        const bool sighted = sight.keys(first + row) > 0;
        const float total = row_sum(sum[i]), factor = (DROPOUT ? a.inverse_keep : 1.0f) / total;
        if (row >= rows) continue;
        if (across == 0) a.lse[blockIdx.x * a.T + first + row] = sighted ? reference[i] + logf(total) : -kInfinity;
        put_row<D>(result[i], factor, sighted, static_cast<float*>(a.y) + ((b * a.T + first + row) * a.H + h) * D);
    }
}

template <class T, int D, bool DROPOUT>
void launch_forward(const AttentionFwd& a, simt::Stream stream) {
    constexpr bool kFloat = std::is_same<T, float>::value;
    using Tiles = std::conditional_t<kFloat, FloatTiles<D>, ForwardTiles<D, DROPOUT>>;
    const auto tiles = static_cast<unsigned>((a.T + Tiles::kQueries - 1) / Tiles::kQueries);
    void (*kernel)(AttentionFwd);
    if constexpr (kFloat)
        kernel = forward_float<D, DROPOUT>;
    else
        kernel = forward<T, D, DROPOUT>;
    simt::launch("attention forward", kernel, dim3(static_cast<unsigned>(a.B * a.H), tiles), dim3(kThreads),
                 Tiles::kBytes, stream, a);
}

template <class T>
void launch_forward(const AttentionFwd& a, simt::Stream stream) {
    for_head_dim(a.D, [&](auto size) {
        constexpr int D = decltype(size)::value;
        a.seed ? launch_forward<T, D, true>(a, stream) : launch_forward<T, D, false>(a, stream);
    });
}

}  // namespace

void attention_fwd(const AttentionFwd& a, Stream stream) {
    const auto on = static_cast<simt::Stream>(stream);
    if (a.B * a.H * a.T == 0) return;
    if (a.dtype == DType::f32) launch_forward<float>(a, on);
    if (a.dtype == DType::f16) launch_forward<simt::half>(a, on);
    if (a.dtype == DType::bf16) launch_forward<simt::bfloat>(a, on);
}

}  // namespace tinygpt::cuda
