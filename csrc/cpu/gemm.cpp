// A single-precision matrix product for the layers of a small GPT, with what follows it, for one instruction set.
//
//     C[M,N] = gelu or factor of (A[M,K] B[K,N] + bias[N] + addend[M,N])
//
// A and B have a row and a column stride each, so one function serves y = x W^T, dx = dy W and dW = dy^T x without a
// transpose beforehand. The scheme is Goto's (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication,
// 2008), cut down to what matrices of a few hundred columns need:
//
//   tile      kMR x kNR numbers of C stay in registers through a block of K: kNV vectors of B are loaded and kMR
//   numbers
//             of A broadcast per step.
//   B         is packed whole into panels [k][kNR]: a panel of one block of K stays in the first-level cache while all
//             of a thread's rows go past it. Packing costs 1 part in M, and is shared among the threads.
//   A         is read where it lies when its rows are contiguous (packing it costs 1 part in N, and N is small here),
//   and
//             packed into panels [k][kMR], a block at a time for the second-level cache, when they are not.
//   K         goes in blocks of a size that depends on K alone; sums of earlier blocks wait in C. Threads share out
//             tiles of C. So no number depends on how many threads there are.
//
// What follows the product happens tile by tile: bias, an addend (the residual, or C itself to accumulate), a factor
// (the stored slope of GELU, in the backward), or GELU itself, which also stores its slope: that is all its backward
// needs. Addends join with the first block and may lie in C; factor and GELU come with the last one.
//
// Left out: packed weights kept between calls (packing is about 1 % at 768 rows, and weights change every step), and
// matrices of few rows, for which packing B costs more than the product (PyTorch serves them; native/linear.py).

#include "gelu.h"
#include "kernels.h"
#include "memory.h"
#include "rows.h"
#include "threads.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

// Rows of a tile: with two vectors of columns, as many accumulators as registers allow beside what is loaded.
#if defined(__AVX512F__)
constexpr int kMR = 12;
#elif defined(__AVX2__)
constexpr int kMR = 6;
#elif defined(__aarch64__)
constexpr int kMR = 8;
#else
constexpr int kMR = 4;
#endif
constexpr int kNV = 2;
constexpr int kNR = kNV * W;

constexpr int64_t kBlockK = 256;            // a panel of B: 16 KB of 32 KB with AVX2
constexpr int64_t kBlockA = 48 * 1024;      // floats of A that go past one panel: 192 KB of the second-level cache
constexpr int64_t kPackedK = 8 * kBlockK;   // what is packed of B at a time, at most: this many rows
constexpr int64_t kPackedFloats = 1 << 20;  // and about this much

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One tile of C, and what is added to it.
struct Tile {
    float* c;
    int64_t c_row;
    const float* add;  // or null; rows add_row apart (0: one row for all)
    int64_t add_row;
};

// acc = A B over kc steps of K, then straight to `t`, or to `aside` [kMR][NV * W] if that is given.
// a: [kc][kMR] packed, or rows a_row apart; b: [kc][NV * W].
template <int NV, bool kPackedA>
__attribute__((noinline)) void multiply(const float* a, int64_t a_row, const float* b, int64_t kc, const Tile& t,
                                        float* aside) {
    vf acc[kMR][NV] = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < kc; ++k) {
        vf right[NV];
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) right[j] = load(b + (k * NV + j) * W);
#pragma GCC unroll 16
        for (int i = 0; i < kMR; ++i) {
            const vf left = splat(kPackedA ? a[k * kMR + i] : a[i * a_row + k]);
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) acc[i][j] += left * right[j];
        }
    }
    if (aside) {
#pragma GCC unroll 16
        for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) store(aside + (i * NV + j) * W, acc[i][j]);
    } else if (t.add) {
#pragma GCC unroll 16
        for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j)
                store(t.c + i * t.c_row + j * W, acc[i][j] + load(t.add + i * t.add_row + j * W));
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) store(t.c + i * t.c_row + j * W, acc[i][j]);
    }
}

// The transpose of a 4 x 4 block.
inline void transpose(const v4* row, v4* turned) {
    const v4 a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5),
             b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
    const v4 c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5),
             d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    turned[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    turned[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    turned[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    turned[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// Copies `count` of kWidth lines of a panel, [k][kWidth], from lines `across` apart with steps of k `along` apart;
// lines beyond are 0.
template <int kWidth>
void pack(float* panel, const float* from, int64_t across, int64_t along, int64_t kc, int64_t count) {
    int64_t k = 0;
    if (count == kWidth && across == 1) {
        for (; k < kc; ++k) std::memcpy(panel + k * kWidth, from + k * along, kWidth * sizeof(float));
        return;
    }
    if (count == kWidth && along == 1 && kWidth % 4 == 0)
        for (; k + 4 <= kc; k += 4)
            for (int i = 0; i + 4 <= kWidth; i += 4) {
                v4 row[4], turned[4];
                for (int r = 0; r < 4; ++r) std::memcpy(&row[r], from + (i + r) * across + k, sizeof(v4));
                transpose(row, turned);
                for (int r = 0; r < 4; ++r) std::memcpy(panel + (k + r) * kWidth + i, &turned[r], sizeof(v4));
            }
    for (; k < kc; ++k)
        for (int64_t i = 0; i < kWidth; ++i) panel[k * kWidth + i] = i < count ? from[i * across + k * along] : 0.0f;
}

// From `aside` [kMR][width] to rows x cols of C at (row, col), with all that follows the product.
template <class Activate>
void finish_rows(const float* aside, int64_t width, int64_t row, int64_t rows, int64_t col, int64_t cols,
                 const float* add, int64_t add_row, const float* bias, Activate activate) {
    for (int64_t i = 0; i < rows; ++i) {
        const float* extra = add ? add + (row + i) * add_row + col : nullptr;
        for_columns(cols, [&](auto get, auto put, int64_t c) {
            vf v = load(aside + i * width + c);
            if (extra) v += get(extra + c);
            if (bias) v += get(bias + col + c);
            activate(get, put, row + i, col + c, v);
        });
    }
}

template <bool TANH>
void finish_gelu(const Gemm& g, const float* aside, int64_t width, int64_t row, int64_t rows, int64_t col, int64_t cols,
                 const float* add, int64_t add_row, const float* bias) {
    finish_rows(aside, width, row, rows, col, cols, add, add_row, bias,
                [&](auto, auto put, int64_t r, int64_t c, vf v) {
                    put(g.c + r * g.c_row + c, gelu<TANH>(v));
                    put(g.slope + r * g.slope_row + c, gelu_derivative<TANH>(v));
                });
}

// first, last: of the blocks of K.
void finish(const Gemm& g, const float* aside, int64_t width, int64_t row, int64_t rows, int64_t col, int64_t cols,
            bool first, bool last) {
    const float* add = first ? g.add : g.c;
    const int64_t add_row = first ? g.add_row : g.c_row;
    const float* bias = first ? g.bias : nullptr;
    if (last && g.activation == Activation::gelu)
        finish_gelu<false>(g, aside, width, row, rows, col, cols, add, add_row, bias);
    else if (last && g.activation == Activation::gelu_tanh)
        finish_gelu<true>(g, aside, width, row, rows, col, cols, add, add_row, bias);
    else if (last && g.factor)
        finish_rows(aside, width, row, rows, col, cols, add, add_row, bias,
                    [&](auto get, auto put, int64_t r, int64_t c, vf v) {
                        put(g.c + r * g.c_row + c, v * get(g.factor + r * g.factor_row + c));
                    });
    else
        finish_rows(aside, width, row, rows, col, cols, add, add_row, bias,
                    [&](auto, auto put, int64_t r, int64_t c, vf v) { put(g.c + r * g.c_row + c, v); });
}

// Tiles [tile_begin, tile_end) x panels [panel_begin, panel_end) of C[:, n0:n1], over one packed stretch of K.
struct Share {
    int64_t tile_begin, tile_end, panel_begin, panel_end;
};

struct Stretch {
    int64_t n0, n1, k0, k1;  // columns of B and rows of B that `packed` holds
    int64_t block;           // of K
    const float* packed;     // per block of K its panels, each [k][kNR], or [k][W] if the last has no more columns
};

constexpr int64_t panel_width(int64_t columns) { return columns <= W ? W : kNR; }
constexpr int64_t padded_columns(int64_t n) { return n / kNR * kNR + (n % kNR ? panel_width(n % kNR) : 0); }

void compute(const Gemm& g, const Stretch& s, const Share& share, float* own) {
    const int64_t padded = padded_columns(s.n1 - s.n0);
    const bool packs = g.a_col != 1;
    alignas(64) float aside[kMR * kNR];
    for (int64_t k0 = s.k0;; k0 += s.block) {
        const int64_t kc = smaller(s.block, s.k1 - k0);
        const bool first = k0 == 0, last = k0 + kc >= g.k;
        const float* add = first ? (g.add ? g.add : g.bias) : g.c;
        const int64_t add_row = first ? (g.add ? g.add_row : 0) : g.c_row;
        const bool follows = (first && g.add && g.bias) || (last && (g.factor || g.activation != Activation::none));
        const int64_t group = larger(1, kBlockA / (kMR * larger(1, kc)));  // tiles that stay in the second-level cache
        for (int64_t t0 = share.tile_begin; t0 < share.tile_end; t0 += group) {
            const int64_t t1 = smaller(t0 + group, share.tile_end);
            for (int64_t t = t0; t < t1; ++t)
                if (packs || (t + 1) * kMR > g.m)
                    pack<kMR>(own + (t - t0) * kMR * kc, g.a + t * kMR * g.a_row + k0 * g.a_col, g.a_row, g.a_col, kc,
                              smaller(kMR, g.m - t * kMR));
            for (int64_t p = share.panel_begin; p < share.panel_end; ++p) {
                const float* b = s.packed + (k0 - s.k0) * padded + p * kNR * kc;
                const int64_t col = s.n0 + p * kNR, cols = smaller(kNR, s.n1 - col), width = panel_width(cols);
                for (int64_t t = t0; t < t1; ++t) {
                    const int64_t row = t * kMR, rows = smaller(kMR, g.m - row);
                    const bool packed = packs || rows < kMR, whole = rows == kMR && cols == width && !follows;
                    const float* a = packed ? own + (t - t0) * kMR * kc : g.a + row * g.a_row + k0;
                    const Tile target{g.c + row * g.c_row + col, g.c_row, add ? add + row * add_row + col : nullptr,
                                      add_row};
                    float* to = whole ? nullptr : aside;
                    if (width == kNR)
                        packed ? multiply<kNV, true>(a, 0, b, kc, target, to)
                               : multiply<kNV, false>(a, g.a_row, b, kc, target, to);
                    else
                        packed ? multiply<1, true>(a, 0, b, kc, target, to)
                               : multiply<1, false>(a, g.a_row, b, kc, target, to);
                    if (!whole) finish(g, aside, width, row, rows, col, cols, first, last);
                }
            }
        }
        if (k0 + kc >= s.k1) break;  // not at the top: K = 0 has one empty block
    }
}

// Share `part` of row_parts * column_parts.
Share share_of(int64_t part, int64_t tiles, int64_t panels, int64_t row_parts, int64_t column_parts) {
    const int64_t r = part / column_parts, c = part % column_parts;
    return {tiles * r / row_parts, tiles * (r + 1) / row_parts, panels * c / column_parts,
            panels * (c + 1) / column_parts};
}

}  // namespace

bool gemm(const Gemm& g) {
    if (g.m == 0 || g.n == 0) return true;
    const int64_t blocks = larger(1, ceil_div(g.k, kBlockK)), block = larger(1, ceil_div(ceil_div(g.k, blocks), 4) * 4);
    const int64_t stretch_k = larger(block, kPackedK / block * block);
    const int64_t stretch_n = larger(kNR, kPackedFloats / smaller(stretch_k, larger(1, g.k)) / kNR * kNR);
    const int64_t tiles = ceil_div(g.m, kMR), widest = ceil_div(smaller(g.n, stretch_n), kNR);
    const int threads = cpu::thread_count(tiles * widest, g.m * g.n * (g.k / 16 + 1));

    const int64_t packed_floats = smaller(stretch_k, g.k) * padded_columns(smaller(stretch_n, g.n));
    const int64_t own_floats = larger(kBlockA, kMR * block);
    float* buffer = cpu::workspace(packed_floats + threads * own_floats);
    if (buffer == nullptr) return false;
    float* const own = buffer + packed_floats;

    for (int64_t n0 = 0; n0 < g.n; n0 += stretch_n)
        for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += stretch_k) {
            const Stretch s{n0, smaller(n0 + stretch_n, g.n), k0, smaller(k0 + stretch_k, g.k), block, buffer};
            const int64_t panels = ceil_div(s.n1 - s.n0, kNR), padded = padded_columns(s.n1 - s.n0);
            const int64_t packs = panels * ceil_div(s.k1 - s.k0, block);
            // Rows or columns, whichever leaves the least for the busiest thread.
            int64_t row_parts = threads, best = ceil_div(tiles, threads) * panels;
            for (int64_t r = threads - 1; r >= 1; --r)
                if (threads % r == 0 && ceil_div(tiles, r) * ceil_div(panels, threads / r) < best) {
                    row_parts = r;
                    best = ceil_div(tiles, r) * ceil_div(panels, threads / r);
                }
#pragma omp parallel num_threads(threads) if (threads > 1)
            {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < packs; ++i) {
                    const int64_t from = s.k0 + i / panels * block, kc = smaller(block, s.k1 - from);
                    const int64_t col = s.n0 + i % panels * kNR, cols = smaller(kNR, s.n1 - col);
                    float* panel = buffer + (from - s.k0) * padded + i % panels * kNR * kc;
                    const float* b = g.b + from * g.b_row + col * g.b_col;
                    panel_width(cols) == kNR ? pack<kNR>(panel, b, g.b_col, g.b_row, kc, cols)
                                             : pack<W>(panel, b, g.b_col, g.b_row, kc, cols);
                }
#pragma omp for schedule(static)
                for (int64_t part = 0; part < threads; ++part)
                    compute(g, s, share_of(part, tiles, panels, row_parts, threads / row_parts),
                            own + part * own_floats);
            }
        }
    return true;
}

}  // namespace tinygpt::TINYGPT_ISA
