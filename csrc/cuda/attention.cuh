// What the forward and the backward of attention share: who sees whom, dropout's mask, tiles in shared memory and the
// products of tiles.
//
// Two-byte types go through the tensor cores. A tile is rows of D elements in shared memory, without padding: the 16
// byte chunks of a row change places with each other by the row's number, so that the eight rows that a matrix of
// ldmatrix takes always lie in different banks. A warp of a block has rows of scores for itself, 16 M of them.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "simt.cuh"

namespace tinygpt::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarp * kWarps;
constexpr int kResident = 2;  // blocks on a multiprocessor, so 255 registers; left alone, ptxas aims at 3 and spills
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

SIMT_DEVICE int least(int a, int b) { return a < b ? a : b; }
SIMT_DEVICE int most(int a, int b) { return a > b ? a : b; }

// What one batch row shows: how many keys are valid, and how many of them each query sees.
struct Sight {
    int valid, T;
    bool causal;

    SIMT_DEVICE Sight(const Attention& a, int b)
        : valid(static_cast<int>(a.S)), T(static_cast<int>(a.T)), causal(a.causal) {
        if (a.kv_lengths == nullptr) return;
        const int64_t length = a.kv_lengths[b];
        valid = length < 0 ? 0 : length < a.S ? static_cast<int>(length) : valid;
    }
    SIMT_DEVICE int keys(int t) const { return causal ? most(0, least(valid, t + 1 + valid - T)) : valid; }
    SIMT_DEVICE int first_query(int s) const { return causal ? most(0, s - valid + T) : 0; }  // that sees key s
};

template <class T>
SIMT_DEVICE const T* at(const Heads& x, int b, int token, int head) {
    return static_cast<const T*>(x.data) + b * x.batch + token * x.token + head * x.head;
}
template <class T>
SIMT_DEVICE T* at(const HeadsOut& x, int b, int token, int head) {
    if (x.data == nullptr) return nullptr;
    return static_cast<T*>(x.data) + b * x.batch + token * x.token + head * x.head;
}

// ------------------------------------------------------------------------------------------------- dropout

// Which weights dropout keeps: four keys to a Philox draw with counter (head, query, key / 4, 0).
struct Dropout {
    uint32_t key0, key1, head, below;

    SIMT_DEVICE Dropout(const Attention& a, int head) : key0(0), key1(0), head(head), below(a.drop_below) {
        if (a.seed == nullptr) return;
        key0 = static_cast<uint32_t>(*a.seed);
        key1 = static_cast<uint32_t>(*a.seed >> 32);
    }

    // Bit i is set where key 4 group + i is kept.
    SIMT_DEVICE unsigned draw(int query, int group) const {
        uint32_t c0 = head, c1 = query, c2 = group, c3 = 0, k0 = key0, k1 = key1;
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const uint64_t m0 = uint64_t{0xD2511F53} * c0, m1 = uint64_t{0xCD9E8D57} * c2;
            c0 = static_cast<uint32_t>(m1 >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(m1);
            c2 = static_cast<uint32_t>(m0 >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(m0);
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        return (c0 >= below) | (c1 >= below) << 1 | (c2 >= below) << 2 | (c3 >= below) << 3;
    }

    SIMT_DEVICE bool keeps(int query, int key) const { return draw(query, key / 4) >> key % 4 & 1; }

    // Of the 16 x 8 scores of queries t.. and keys s.., bit i for the element i that this lane holds. Two lanes need
    // the same two draws: each makes one.
    SIMT_DEVICE unsigned of_queries(int t, int s) const {
        const int lane = threadIdx.x % kWarp, odd = lane & 1;
        const unsigned bits = draw(t + lane / 4 + 8 * odd, s / 4 + lane % 4 / 2);
        const unsigned mine = odd ? bits >> 2 : bits & 3;
        const unsigned other = __shfl_xor_sync(simt::kWholeWarp, odd ? bits & 3 : bits >> 2, 1);
        return odd ? other | mine << 2 : mine | other << 2;
    }

    // The same of keys s.. and queries t..: the tile has 32 draws, one for each lane; four lanes need the same four.
    SIMT_DEVICE unsigned of_keys(int s, int t) const {
        const int lane = threadIdx.x % kWarp, own = lane / 4 % 4;
        unsigned bits = draw(t + lane % 4 * 2 + own % 2, s / 4 + lane / 16 + own / 2 * 2) << 4 * own;
        bits |= __shfl_xor_sync(simt::kWholeWarp, bits, 4);
        bits |= __shfl_xor_sync(simt::kWholeWarp, bits, 8);
        bits >>= own;
        return (bits & 1) | (bits >> 3 & 2) | (bits >> 6 & 4) | (bits >> 9 & 8);
    }
};

// ------------------------------------------------------------------------------------------------- two-byte types

// The chunks of a row are exchanged within groups of this many: 128 bytes, or 64 where rows are no multiple of 128.
template <int D>
constexpr int kTurn = D % 64 == 0 ? 8 : 4;

// Where chunk `chunk` of row `row` of a tile begins.
template <int D>
SIMT_DEVICE int place(int row, int chunk) {
    return row * D + 8 * (chunk ^ (kTurn<D> == 8 ? row & 7 : row >> 1 & 3));
}

// The same 2 `step` chunks to the right of a place that lies in the first two chunks of its row before the exchange:
// few numbers to keep, as what depends on the thread is in `from`.
template <int D>
SIMT_DEVICE int moved(int from, int step) {
    constexpr int kSteps = kTurn<D> / 2;
    return (from ^ (16 * (step % kSteps))) + 16 * (step / kSteps * kSteps);
}

// Starts to copy ROWS rows, `stride` apart; zeros from row `count` on.
template <int D, int ROWS, class T>
SIMT_DEVICE void fetch(T* tile, const T* from, int64_t stride, int count) {
    constexpr int kRows = kThreads / kTurn<D>;  // at once
    static_assert(ROWS % kRows == 0, "every thread copies as much");
    const int row = threadIdx.x / kTurn<D>, chunk = threadIdx.x % kTurn<D>;
    tile += place<D>(row, chunk);
    from += row * stride + 8 * chunk;
    const int64_t step = kRows * stride;
#pragma unroll
    for (int r = 0; r < ROWS; r += kRows, from += step)
#pragma unroll
        for (int c = 0; c < D; c += 8 * kTurn<D>) simt::cp_async16(tile + r * D + c, from + c, row + r < count);
}

// Rows row to row + 16, columns 16 step to 16 step + 16 of a tile: the left operand of a product.
template <int D, class T>
SIMT_DEVICE void left_operand(uint32_t (&a)[4], const T* tile, int row, int step) {
    const int lane = threadIdx.x % kWarp;
    simt::ldmatrix(a, tile + row * D + moved<D>(place<D>(lane % 16, lane / 16), step));
}

// c += A Bᵀ over the D columns: A is 16 M rows, given by `left(fragment, m, step)`, B the first 8 N rows of a tile.
template <int D, class T, int M, int N, class Left>
SIMT_DEVICE void multiply_rows(float (&c)[M][N][4], const Left& left, const T* tile) {
    const int lane = threadIdx.x % kWarp, from = place<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) left(a[m], m, step);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            simt::ldmatrix(b, tile + 8 * n * D + moved<D>(from, step));
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < M; ++m) {
                simt::mma<T>(c[m][n], a[m], first);
                simt::mma<T>(c[m][n + 1], a[m], second);
            }
        }
    }
}

// c += A B: A is 16 M rows and 8 N columns in the registers that a product left it in, rounded to T here; B the first
// 8 N rows of a tile.
template <int D, class T, int M, int N>
SIMT_DEVICE void multiply_columns(float (&c)[M][D / 8][4], const float (&a)[M][N][4], const T* tile) {
    const int lane = threadIdx.x % kWarp, from = place<D>(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                left[m][i] = simt::pack2<T>(a[m][2 * k + i / 2][i % 2 * 2], a[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            uint32_t b[4];
            simt::ldmatrix_transposed(b, tile + 16 * k * D + moved<D>(from, d));
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < M; ++m) {
                simt::mma<T>(c[m][2 * d], left[m], first);
                simt::mma<T>(c[m][2 * d + 1], left[m], second);
            }
        }
    }
}

// Writes a warp's 16 M rows, `stride` apart, in vectors of 16 bytes: through `tile`, of which it alone uses rows `row`
// and on. Of the rows from there, those to `count` exist, and those from `live` on are zeros.
template <int D, class T, int M>
SIMT_DEVICE void put_rows(const float (&c)[M][D / 8][4], T* tile, int row, T* to, int64_t stride, int live, int count) {
    constexpr int kChunks = D / 8;
    const int lane = threadIdx.x % kWarp;
    if (to == nullptr) return;
    __syncwarp();  // other lanes have read these rows
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int r = 16 * m + lane / 4 + 4 * i;
#pragma unroll
            for (int d = 0; d < kChunks; ++d) {
                const float low = r < live ? c[m][d][i] : 0.0f, high = r < live ? c[m][d][i + 1] : 0.0f;
                *reinterpret_cast<uint32_t*>(tile + place<D>(row + r, d) + lane % 4 * 2) = simt::pack2<T>(low, high);
            }
        }
    __syncwarp();
    constexpr int kRows = kWarp / kTurn<D>;  // at once
    const int first = lane / kTurn<D>, chunk = lane % kTurn<D>;
    to += first * stride + 8 * chunk;
    const int64_t step = kRows * stride;
#pragma unroll
    for (int r = 0; r < 16 * M; r += kRows, to += step)
        if (first + r < count) {
#pragma unroll
            for (int c = 0; c < kChunks; c += kTurn<D>)
                simt::copy16(to + 8 * c, tile + place<D>(row + first + r, chunk + c));
        }
}

// ------------------------------------------------------------------------------------------------- float32

// 128 threads as 16 x 8 have every 16th row and every 8th column of a tile's scores, and of D columns every 8th vector.
// A row of scores belongs to 8 lanes of one warp. Four more floats a row keep the lanes' vectors in different banks; of
// scores, which are written one by one, eight.
constexpr int kAcross = 8, kDown = kThreads / kAcross;

using Four = simt::Vector<float, 4>;

template <int D>
constexpr int kPitch = D + 4;
template <int N>
constexpr int kScores = N + 8;

template <int D, int ROWS>
SIMT_DEVICE void copy_rows(float* tile, const float* from, int64_t stride, int count) {
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < ROWS * D; i += 4 * kThreads) {
        const int row = i / D, d = i % D;
        const Four v = row < count ? simt::load<float, 4>(from + row * stride + d) : Four{};
        simt::store<float, 4>(tile + row * kPitch<D> + d, v);
    }
}

// c = A Bᵀ over D columns; A's rows are `down` + 16 i, B's `across` + 8 j.
template <int D, int M, int N>
SIMT_DEVICE void multiply_rows(float (&c)[M][N], const float* a, const float* b) {
    const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) c[i][j] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
        Four x[M], y[N];
#pragma unroll
        for (int i = 0; i < M; ++i) x[i] = simt::load<float, 4>(a + (down + kDown * i) * kPitch<D> + d);
#pragma unroll
        for (int j = 0; j < N; ++j) y[j] = simt::load<float, 4>(b + (across + kAcross * j) * kPitch<D> + d);
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j)
#pragma unroll
                for (int k = 0; k < 4; ++k) c[i][j] += x[i].at[k] * y[j].at[k];
    }
}

// c += A B: A's rows are scores, 8 N of them, B's rows D numbers.
template <int D, int M, int N>
SIMT_DEVICE void multiply_columns(float (&c)[M][D / 32][4], const float* a, const float* b) {
    const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
#pragma unroll 2
    for (int s = 0; s < kAcross * N; s += 4) {
        Four x[M];
#pragma unroll
        for (int i = 0; i < M; ++i) x[i] = simt::load<float, 4>(a + (down + kDown * i) * kScores<kAcross * N> + s);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int d = 0; d < D / 32; ++d) {
                const Four y = simt::load<float, 4>(b + (s + k) * kPitch<D> + 4 * (across + kAcross * d));
#pragma unroll
                for (int i = 0; i < M; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) c[i][d][e] += x[i].at[k] * y.at[e];
            }
    }
}

// Writes a thread's part of a row; zeros unless `live`.
template <int D>
SIMT_DEVICE void put_row(const float (&c)[D / 32][4], float factor, bool live, float* to) {
    const int across = threadIdx.x % kAcross;
    if (to == nullptr) return;
#pragma unroll
    for (int d = 0; d < D / 32; ++d) {
        Four v;
#pragma unroll
        for (int e = 0; e < 4; ++e) v.at[e] = live ? c[d][e] * factor : 0.0f;
        simt::store<float, 4>(to + 4 * (across + kAcross * d), v);
    }
}

// The sum, or the largest, over the 8 lanes that share a row.
SIMT_DEVICE float row_sum(float x) {
    for (int step = kAcross / 2; step > 0; step /= 2) x += __shfl_xor_sync(simt::kWholeWarp, x, step);
    return x;
}
SIMT_DEVICE float row_top(float x) {
    for (int step = kAcross / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(simt::kWholeWarp, x, step));
    return x;
}

// Calls `with(size)` for the size among those that have kernels, as a constant.
template <class With>
void for_head_dim(int64_t D, const With& with) {
    if (D == 32) return with(std::integral_constant<int, 32>());
    if (D == 64) return with(std::integral_constant<int, 64>());
    if (D == 96) return with(std::integral_constant<int, 96>());
    if (D == 128) return with(std::integral_constant<int, 128>());
    throw std::invalid_argument("attention on cuda: head_dim " + std::to_string(D) + " is not one of 32, 64, 96, 128");
}

}  // namespace
}  // namespace tinygpt::cuda
