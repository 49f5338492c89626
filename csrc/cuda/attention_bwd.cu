// Attention, backward. With weights P = exp(q kᵀ scale - lse), computed again from the saved lse, and dropout's mask M
// (1 / (1 - p) or 0):
//     dv = (P M)ᵀ dy,    dP = (dy vᵀ) M,    dS = P (dP - delta) with delta = rowsum(dy y),    dq = dS k scale,
//     dk = dSᵀ q scale
// (Dao et al. 2022, "FlashAttention", section B.4).
//
// Three launches: delta and lse of every query, padded to whole tiles; dq, a block for a tile of queries; dk and dv, a
// block for a tile of keys and all query heads of its group. Scores are computed twice, for nobody else then adds to
// what a block adds up: no atomics, and the same result each time.
//
// The latter two are one kernel: a block has `own` rows, of queries or of keys, and goes through tiles of the `other`
// side. Products of own rows with a tile's give its scores and their gradients, in registers just as the next products
// need them on their left. So it is the transpose of the scores that the block of keys has.
//
// Other tiles arrive while one is worked on, as in the forward; those that no mask crosses run code without one. Of
// rows that are not there only keys past the end need masking: queries past the end have lse +inf, thus weight 0, and
// what own keys past the end add up is not written.

#include "attention.cuh"

namespace tinygpt::cuda {
namespace {

constexpr int kPadding = 128;  // whole tiles of queries in every kernel

int64_t padded(int64_t T) { return (T + kPadding - 1) / kPadding * kPadding; }

// What the kernels read of each query: [B H, padded T] of both, in memory that Python allocates.
struct Statistics {
    float* lse;  // in powers of two for two-byte types; +inf where nothing is seen, and past the end
    float* delta;
    int pitch;

    SIMT_DEVICE int64_t of(int head, int t) const { return static_cast<int64_t>(head) * pitch + t; }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads) gather_statistics(AttentionBwd a, Statistics stats) {
    constexpr bool kVectors = sizeof(T) == 2;
    constexpr int N = kVectors ? 8 : 1, kLanes = kVectors ? 4 : kWarp;  // lanes for a row
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const int lane = threadIdx.x % kLanes, t = static_cast<int>(row % stats.pitch);
    const int head = static_cast<int>(row / stats.pitch), H = static_cast<int>(a.H);
    float delta = 0.0f;
    if (t < a.T) {
        const T *dy = at<T>(a.dy, head / H, t, head % H), *y = at<T>(a.y, head / H, t, head % H);
#pragma unroll
        for (int d = lane * N; d < D; d += kLanes * N) {
            const auto left = simt::load<T, N>(dy + d), right = simt::load<T, N>(y + d);
#pragma unroll
            for (int i = 0; i < N; ++i) delta += simt::to_float(left.at[i]) * simt::to_float(right.at[i]);
        }
    }
    for (int step = kLanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(simt::kWholeWarp, delta, step);
    if (lane != 0) return;
    const float lse = t < a.T ? a.lse[head * a.T + t] : -INFINITY;
    stats.lse[row] = lse == -INFINITY ? INFINITY : kVectors ? lse * kLog2E : lse;
    stats.delta[row] = delta;
}

// The place of a block: its own rows, and where the other side's rows begin and end that meet them.
template <bool BY_KEYS, int OWN, int OTHER>
struct Meeting {
    const Sight sight;
    int b, head, heads, kv;     // query heads `head` and on
    int first, rows, live;      // own: those that exist, and those that may get a gradient but 0
    int low, high, tiles;       // other
    int clear_low, clear_high;  // tiles between these see all

    SIMT_DEVICE explicit Meeting(const AttentionBwd& a) : sight(a, blockIdx.x / static_cast<int>(BY_KEYS ? a.K : a.H)) {
        const int group = static_cast<int>(a.H / a.K), columns = static_cast<int>(BY_KEYS ? a.K : a.H);
        b = blockIdx.x / columns;
        kv = BY_KEYS ? blockIdx.x % columns : blockIdx.x % columns / group;
        head = BY_KEYS ? kv * group : blockIdx.x % columns;
        heads = BY_KEYS ? group : 1;
        first = static_cast<int>(BY_KEYS ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * OWN;  // the longest first
        rows = least(OWN, static_cast<int>(BY_KEYS ? a.S : a.T) - first);
        live = BY_KEYS ? least(rows, sight.valid - first) : rows;
        low = BY_KEYS && live > 0 ? sight.first_query(first) / OTHER * OTHER : 0;
        high = live <= 0 ? 0 : BY_KEYS ? sight.T : sight.keys(first + rows - 1);
        tiles = (high - low + OTHER - 1) / OTHER;
        clear_low = BY_KEYS ? sight.first_query(first + live - 1) : 0;
        clear_high = BY_KEYS ? high + OTHER : sight.keys(first);
    }
    SIMT_DEVICE bool clear(int x) const { return clear_low <= x && x + OTHER <= clear_high; }
    SIMT_DEVICE bool sees(int own, int x) const {
        return BY_KEYS ? x >= sight.first_query(first + own) : x < sight.keys(first + own);
    }
};

// As much as registers hold: dk, dv and dropout's numbers for 32 keys of 64 elements do not fit together.
template <int D, bool BY_KEYS, bool DROPOUT>
struct BackwardTiles {
    static constexpr int M = D == 32 || (D == 64 && !(BY_KEYS && DROPOUT)) ? 2 : 1;
    static constexpr int kOther = 32;
    static constexpr bool kHeld = !BY_KEYS && M == 1;  // own rows stay in registers
    static constexpr int kOwn = 16 * M * kWarps;
    static constexpr int kBytes = (2 * kOwn + 4 * kOther) * D * 2 + (BY_KEYS ? 4 * kOther * 4 : 0);
};

template <class T, int D, bool BY_KEYS, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, kResident) backward(AttentionBwd a, Statistics stats) {
    using Tiles = BackwardTiles<D, BY_KEYS, DROPOUT>;
    constexpr int M = Tiles::M, N = Tiles::kOther / 8, kOwn = Tiles::kOwn, kOther = Tiles::kOther;
    const Meeting<BY_KEYS, kOwn, kOther> meeting(a);
    const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 * M;
    const int b = meeting.b, kv = meeting.kv, first = meeting.first, H = static_cast<int>(a.H);
    const int total = meeting.tiles * meeting.heads;

    simt::SharedMemory memory;
    T* own = memory.take<T>(kOwn * D);               // q or k
    T* own_grad = memory.take<T>(kOwn * D);          // dy or v
    T* other = memory.take<T>(2 * kOther * D);       // k or q
    T* other_grad = memory.take<T>(2 * kOther * D);  // v or dy
    float* columns = nullptr;                        // lse and delta of queries on the other side
    if constexpr (BY_KEYS) columns = memory.take<float>(4 * kOther);

    int next = meeting.low, next_head = meeting.head;
    const auto fetch_next = [&](int stage) {
        T *tile = other + stage * kOther * D, *tile_grad = other_grad + stage * kOther * D;
        if constexpr (BY_KEYS) {
            fetch<D, kOther>(tile, at<T>(a.q, b, next, next_head), a.q.token, meeting.high - next);
            fetch<D, kOther>(tile_grad, at<T>(a.dy, b, next, next_head), a.dy.token, meeting.high - next);
            const int64_t from = stats.of(b * H + next_head, next);
            const int i = threadIdx.x * 4;
            if (i < 2 * kOther)
                simt::cp_async16(columns + stage * 2 * kOther + i,
                                 i < kOther ? stats.lse + from + i : stats.delta + from + i - kOther);
        } else {
            fetch<D, kOther>(tile, at<T>(a.k, b, next, kv), a.k.token, meeting.high - next);
            fetch<D, kOther>(tile_grad, at<T>(a.v, b, next, kv), a.v.token, meeting.high - next);
        }
        simt::cp_async_commit();
        next += kOther;
        if (next >= meeting.high) {
            next = meeting.low;
            ++next_head;
        }
    };
    if (total > 0) {
        const int h = meeting.head;
        fetch<D, kOwn>(own, BY_KEYS ? at<T>(a.k, b, first, kv) : at<T>(a.q, b, first, h),
                       BY_KEYS ? a.k.token : a.q.token, meeting.live);
        fetch<D, kOwn>(own_grad, BY_KEYS ? at<T>(a.v, b, first, kv) : at<T>(a.dy, b, first, h),
                       BY_KEYS ? a.v.token : a.dy.token, meeting.live);
        fetch_next(0);
    }

    float lse[M][2], delta[M][2];
    if constexpr (!BY_KEYS) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t from = stats.of(blockIdx.x, first + row + 16 * m + 8 * r + lane / 4);
                lse[m][r] = stats.lse[from];
                delta[m][r] = stats.delta[from];
            }
    }
    const float scale = a.scale * kLog2E;
    uint32_t held[2][Tiles::kHeld ? D / 16 : 1][M][4];
    const auto operand = [&](uint32_t (&f)[4], const T* tile, int which, int m, int step) {
        if constexpr (Tiles::kHeld) {
#pragma unroll
            for (int i = 0; i < 4; ++i) f[i] = held[which][step][m][i];
        } else {
            left_operand<D>(f, tile, row + 16 * m, step);
        }
    };
    const auto left = [&](uint32_t (&f)[4], int m, int step) { operand(f, own, 0, m, step); };
    const auto left_grad = [&](uint32_t (&f)[4], int m, int step) { operand(f, own_grad, 1, m, step); };

    float result[M][D / 8][4] = {};                     // dq or dk
    float result_grad[BY_KEYS ? M : 1][D / 8][4] = {};  // dv

    const auto work = [&](int x, int head, int stage, auto masked) {
        const T *tile = other + stage * kOther * D, *tile_grad = other_grad + stage * kOther * D;
        const Dropout dropout(a, b * H + head);
        float p[M][N][4] = {}, ds[M][N][4] = {};
        multiply_rows<D, T>(p, left, tile);
        multiply_rows<D, T>(ds, left_grad, tile_grad);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            simt::Vector<float, 2> column_lse, column_delta;
            if constexpr (BY_KEYS) {
                column_lse = simt::load<float, 2>(columns + stage * 2 * kOther + 8 * n + lane % 4 * 2);
                column_delta = simt::load<float, 2>(columns + stage * 2 * kOther + kOther + 8 * n + lane % 4 * 2);
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
                unsigned kept = 0;
                if constexpr (DROPOUT)
                    kept = BY_KEYS ? dropout.of_keys(first + row + 16 * m, x + 8 * n)
                                   : dropout.of_queries(first + row + 16 * m, x + 8 * n);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float level = BY_KEYS ? column_lse.at[i % 2] : lse[m][i / 2];
                    float weight = simt::exp2_fast(p[m][n][i] * scale - level);
                    if constexpr (decltype(masked)::value)
                        if (!meeting.sees(row + 16 * m + i / 2 * 8 + lane / 4, x + 8 * n + lane % 4 * 2 + i % 2))
                            weight = 0.0f;
                    float grad = ds[m][n][i];
                    if constexpr (DROPOUT) grad = kept >> i & 1 ? grad * a.inverse_keep : 0.0f;
                    ds[m][n][i] = weight * (grad - (BY_KEYS ? column_delta.at[i % 2] : delta[m][i / 2]));
                    p[m][n][i] = DROPOUT && !(kept >> i & 1) ? 0.0f : weight;
                }
            }
        }
        if constexpr (BY_KEYS) multiply_columns<D>(result_grad, p, tile_grad);
        multiply_columns<D>(result, ds, tile);
    };

    int x = meeting.low, head = meeting.head;
    for (int item = 0; item < total; ++item) {
        simt::cp_async_wait<0>();
        __syncthreads();  // this tile is there, and the one before it is done with
        if (item + 1 < total) fetch_next((item + 1) % 2);
        if constexpr (Tiles::kHeld) {
            if (item == 0) {
#pragma unroll
                for (int step = 0; step < D / 16; ++step) {
                    left_operand<D>(held[0][step][0], own, row, step);
                    left_operand<D>(held[1][step][0], own_grad, row, step);
                }
            }
        }
        if (meeting.clear(x))
            work(x, head, item % 2, std::false_type());
        else
            work(x, head, item % 2, std::true_type());
        x += kOther;
        if (x >= meeting.high) {
            x = meeting.low;
            ++head;
        }
    }

#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int d = 0; d < D / 8; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                result[m][d][i] *= a.scale;
                if constexpr (BY_KEYS && DROPOUT) result_grad[m][d][i] *= a.inverse_keep;
            }
    const HeadsOut& to = BY_KEYS ? a.dk : a.dq;
    put_rows<D>(result, own, row, at<T>(to, b, first + row, BY_KEYS ? kv : meeting.head), to.token, meeting.live - row,
                meeting.rows - row);
    if constexpr (BY_KEYS)
        put_rows<D>(result_grad, own_grad, row, at<T>(a.dv, b, first + row, kv), a.dv.token, meeting.live - row,
                    meeting.rows - row);
}

template <int D, bool BY_KEYS>
struct FloatBackwardTiles {
    static constexpr int M = 2, N = 4, kOwn = M * kDown, kOther = N * kAcross;
    static constexpr int kBytes = 4 * (2 * (kOwn + kOther) * kPitch<D> + (BY_KEYS ? 2 : 1) * kOwn * kScores<kOther>);
};

template <int D, bool BY_KEYS, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, kResident) backward_float(AttentionBwd a, Statistics stats) {
    using Tiles = FloatBackwardTiles<D, BY_KEYS>;
    constexpr int M = Tiles::M, N = Tiles::N, kOwn = Tiles::kOwn, kOther = Tiles::kOther;
    const Meeting<BY_KEYS, kOwn, kOther> meeting(a);
    const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
    const int b = meeting.b, kv = meeting.kv, first = meeting.first, H = static_cast<int>(a.H);

    simt::SharedMemory memory;
    float* own = memory.take<float>(kOwn * kPitch<D>);
    float* own_grad = memory.take<float>(kOwn * kPitch<D>);
    float* other = memory.take<float>(kOther * kPitch<D>);
    float* other_grad = memory.take<float>(kOther * kPitch<D>);
    float* score_grads = memory.take<float>(kOwn * kScores<kOther>);
    float* weights = nullptr;
    if constexpr (BY_KEYS) weights = memory.take<float>(kOwn * kScores<kOther>);
    if (meeting.tiles > 0) {
        const int h = meeting.head;
        copy_rows<D, kOwn>(own, BY_KEYS ? at<float>(a.k, b, first, kv) : at<float>(a.q, b, first, h),
                           BY_KEYS ? a.k.token : a.q.token, meeting.live);
        copy_rows<D, kOwn>(own_grad, BY_KEYS ? at<float>(a.v, b, first, kv) : at<float>(a.dy, b, first, h),
                           BY_KEYS ? a.v.token : a.dy.token, meeting.live);
    }

    float result[M][D / 32][4] = {}, result_grad[BY_KEYS ? M : 1][D / 32][4] = {};
    for (int head = meeting.head; head < meeting.head + meeting.heads; ++head) {
        const Dropout dropout(a, b * H + head);
        for (int x = meeting.low; x < meeting.high; x += kOther) {
            __syncthreads();  // the tile before is done with
            const int count = meeting.high - x;
            copy_rows<D, kOther>(other, BY_KEYS ? at<float>(a.q, b, x, head) : at<float>(a.k, b, x, kv),
                                 BY_KEYS ? a.q.token : a.k.token, count);
            copy_rows<D, kOther>(other_grad, BY_KEYS ? at<float>(a.dy, b, x, head) : at<float>(a.v, b, x, kv),
                                 BY_KEYS ? a.dy.token : a.v.token, count);
            __syncthreads();
            float p[M][N], ds[M][N];
            multiply_rows<D>(p, own, other);
            multiply_rows<D>(ds, own_grad, other_grad);
            const bool clear = meeting.clear(x);
#pragma unroll
            for (int i = 0; i < M; ++i)
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const int row = down + kDown * i, column = across + kAcross * j;
                    const int query = BY_KEYS ? x + column : first + row, key = BY_KEYS ? first + row : x + column;
                    const int64_t from = stats.of(b * H + head, query);
                    float weight = expf(p[i][j] * a.scale - stats.lse[from]), grad = ds[i][j];
                    if (!clear && !meeting.sees(row, x + column)) weight = 0.0f;
                    float kept = 1.0f;
                    if constexpr (DROPOUT) kept = dropout.keeps(query, key) ? a.inverse_keep : 0.0f;
                    score_grads[row * kScores<kOther> + column] = weight * (grad * kept - stats.delta[from]);
                    if constexpr (BY_KEYS) weights[row * kScores<kOther> + column] = weight * kept;
                }
            __syncwarp();  // rows of scores are a warp's own
            multiply_columns<D, M, N>(result, score_grads, other);
            if constexpr (BY_KEYS) multiply_columns<D, M, N>(result_grad, weights, other_grad);
        }
    }

    const HeadsOut& to = BY_KEYS ? a.dk : a.dq;
#pragma unroll
    for (int i = 0; i < M; ++i) {
        const int row = down + kDown * i;
        if (row >= meeting.rows) continue;
        put_row<D>(result[i], a.scale, row < meeting.live, at<float>(to, b, first + row, BY_KEYS ? kv : meeting.head));
        if constexpr (BY_KEYS)
            put_row<D>(result_grad[i], 1.0f, row < meeting.live, at<float>(a.dv, b, first + row, kv));
    }
}

template <class T, int D, bool BY_KEYS, bool DROPOUT>
void launch_side(const AttentionBwd& a, const Statistics& stats, simt::Stream stream) {
    constexpr bool kFloat = std::is_same<T, float>::value;
    using Tiles = std::conditional_t<kFloat, FloatBackwardTiles<D, BY_KEYS>, BackwardTiles<D, BY_KEYS, DROPOUT>>;
    const int64_t heads = a.B * (BY_KEYS ? a.K : a.H), rows = BY_KEYS ? a.S : a.T;
    if (heads * rows == 0) return;
    const dim3 grid(static_cast<unsigned>(heads), static_cast<unsigned>((rows + Tiles::kOwn - 1) / Tiles::kOwn));
    void (*kernel)(AttentionBwd, Statistics);
    if constexpr (kFloat)
        kernel = backward_float<D, BY_KEYS, DROPOUT>;
    else
        kernel = backward<T, D, BY_KEYS, DROPOUT>;
    simt::launch(BY_KEYS ? "attention backward, dk and dv" : "attention backward, dq", kernel, grid, dim3(kThreads),
                 Tiles::kBytes, stream, a, stats);
}

template <class T, int D>
void launch_backward(const AttentionBwd& a, const Statistics& stats, simt::Stream stream) {
    const int64_t lanes = a.B * a.H * stats.pitch * (sizeof(T) == 2 ? 4 : kWarp);
    if (lanes > 0)
        simt::launch("attention backward, statistics", gather_statistics<T, D>,
                     dim3(static_cast<unsigned>(lanes / kThreads)), dim3(kThreads), 0, stream, a, stats);
    if (a.dq.data != nullptr)
        a.seed ? launch_side<T, D, false, true>(a, stats, stream) : launch_side<T, D, false, false>(a, stats, stream);
    if (a.dk.data != nullptr || a.dv.data != nullptr)
        a.seed ? launch_side<T, D, true, true>(a, stats, stream) : launch_side<T, D, true, false>(a, stats, stream);
}

}  // namespace

int64_t attention_bwd_workspace(int64_t B, int64_t H, int64_t T) { return 2 * B * H * padded(T); }

void attention_bwd(const AttentionBwd& a, float* workspace, Stream stream) {
    const Statistics stats{workspace, workspace + a.B * a.H * padded(a.T), static_cast<int>(padded(a.T))};
    for_head_dim(a.D, [&](auto size) {
        constexpr int D = decltype(size)::value;
        const auto on = static_cast<simt::Stream>(stream);
        if (a.dtype == DType::f32) launch_backward<float, D>(a, stats, on);
        if (a.dtype == DType::f16) launch_backward<simt::half, D>(a, stats, on);
        if (a.dtype == DType::bf16) launch_backward<simt::bfloat, D>(a, stats, on);
    });
}

}  // namespace tinygpt::cuda
