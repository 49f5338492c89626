// A single-precision matrix product for the layers of a small GPT, with what follows it, for one instruction set.
//
//     C[M,N] = gelu or factor of (A[M,K] B[K,N] + bias[N] + addend[M,N])
//
// A and B have a row and a column stride each, so one function serves y = x W^T, dx = dy W and dW = dy^T x without a
// transpose beforehand. The scheme is Goto's (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication,
// 2008), turned towards matrices of many rows and a few hundred columns.
//
// Tile: kMR x kNR numbers of C stay in registers through a block of K; each step loads kNV vectors of B and broadcasts
// kMR numbers of A.
//
// B: one panel [k][kNR] at a time is packed into the first-level cache, and all rows of a thread go past it. Every
// thread packs the panels it needs: packing them once for all would cost a barrier and a trip through memory.
//
// A: read where it lies when its rows are contiguous and columns few; else packed into panels [k][kMR], as many as
// kBlockA holds. That is more than the second-level cache has: a panel of A streams past faster than it is used (4
// bytes a cycle), whereas fewer rows a block would mean packing B once more for each.
//
// K: in blocks of a size that depends on K alone; sums of earlier blocks wait in C. Threads share out tiles of C. So no
// number depends on how many threads there are.
//
// What follows the product happens tile by tile: bias, an addend (the residual, or C itself to accumulate), a factor
// (the stored slope of GELU, in the backward), or GELU itself, which also stores its slope: that is all its backward
// needs. Addends join with the first block and may lie in C; factor and GELU come with the last one. A plain product,
// one with a bias and one with an addend go to C straight from registers; the others by way of the tile's 400 bytes in
// the cache.
//
// Left out: packed weights kept between calls (they change every step), and matrices of few rows, for which packing B
// costs more than the product (native/linear.py leaves them to PyTorch).

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

constexpr int64_t kBlockK = 256;         // a panel of B: 16 KB of the first-level cache's 32 KB with AVX2
constexpr int64_t kBlockA = 192 * 1024;  // floats of A per block
constexpr int64_t kNarrow = 192;         // with fewer columns than this packing A does not pay
constexpr int64_t kAhead = 16;           // rows: a panel's rows lie too far apart for the hardware to foresee

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

// Copies `lines` lines, `across` apart with steps of k `along` apart, into panels [k][kWidth]; 0 beyond the last line.
template <int kWidth>
void pack(float* panels, const float* from, int64_t across, int64_t along, int64_t kc, int64_t lines) {
    const int64_t full = lines / kWidth;
    int64_t p = 0;
    if (across == 1) {
        constexpr int64_t kTogether = 8;  // panels whose lines lie in the same cache lines
        for (; p < full; p += kTogether)
            for (int64_t k = 0; k < kc; ++k) {
                __builtin_prefetch(from + p * kWidth + (k + kAhead) * along);
                for (int64_t q = p; q < smaller(p + kTogether, full); ++q)
                    std::memcpy(panels + (q * kc + k) * kWidth, from + q * kWidth + k * along, kWidth * sizeof(float));
            }
        p = full;
    }
    for (; p * kWidth < lines; ++p) {
        float* panel = panels + p * kc * kWidth;
        const float* start = from + p * kWidth * across;
        int64_t k = 0;
        if (p < full && along == 1)
            for (; k + 4 <= kc; k += 4) {
                for (int i = 0; i + 4 <= kWidth; i += 4) {
                    v4 row[4], turned[4];
                    for (int r = 0; r < 4; ++r) std::memcpy(&row[r], start + (i + r) * across + k, sizeof(v4));
                    transpose(row, turned);
                    for (int r = 0; r < 4; ++r) std::memcpy(panel + (k + r) * kWidth + i, &turned[r], sizeof(v4));
                }
                if (constexpr int i = kWidth / 4 * 4; i < kWidth) {  // two lines more
                    v4 row[4] = {}, turned[4];
                    for (int r = 0; r < 2; ++r) std::memcpy(&row[r], start + (i + r) * across + k, sizeof(v4));
                    transpose(row, turned);
                    for (int r = 0; r < 4; ++r)
                        std::memcpy(panel + (k + r) * kWidth + i, &turned[r], 2 * sizeof(float));
                }
            }
        for (; k < kc; ++k)
            for (int64_t i = 0; i < kWidth; ++i)
                panel[k * kWidth + i] = p * kWidth + i < lines ? start[i * across + k * along] : 0.0f;
    }
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

// A thread's part of C: tiles of rows, and panels of columns.
struct Part {
    int64_t tile_begin, tile_end, panel_begin, panel_end;
};

// Floats of packed A per thread.
int64_t own_floats(const Gemm& g, int64_t block) {
    return larger(kMR * block, smaller(kBlockA, ceil_div(g.m, kMR) * kMR * block));
}

// own: a block of A, then a panel of B.
void compute(const Gemm& g, int64_t block, const Part& part, float* own) {
    const bool packs = g.a_col != 1 || (part.panel_end - part.panel_begin) * kNR >= kNarrow;
    float* const panel = own + own_floats(g, block);
    alignas(64) float aside[kMR * kNR];
    for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += block) {  // K = 0 has one empty block
        const int64_t kc = smaller(block, g.k - k0);
        const bool first = k0 == 0, last = k0 + kc >= g.k;
        const float* add = first ? (g.add ? g.add : g.bias) : g.c;
        const int64_t add_row = first ? (g.add ? g.add_row : 0) : g.c_row;
        const bool follows = (first && g.add && g.bias) || (last && (g.factor || g.activation != Activation::none));
        const int64_t group = larger(1, kBlockA / (kMR * larger(1, kc)));
        for (int64_t t0 = part.tile_begin; t0 < part.tile_end; t0 += group) {
            const int64_t t1 = smaller(t0 + group, part.tile_end);
            const int64_t packed_from = packs ? t0 : g.m / kMR;  // the incomplete tile is always packed
            if (packed_from < t1) {
                const int64_t row = packed_from * kMR;
                pack<kMR>(own, g.a + row * g.a_row + k0 * g.a_col, g.a_row, g.a_col, kc, smaller(t1 * kMR, g.m) - row);
            }
            for (int64_t p = part.panel_begin; p < part.panel_end; ++p) {
                const int64_t col = p * kNR, cols = smaller(kNR, g.n - col), width = cols <= W ? W : kNR;
                const float* b = g.b + k0 * g.b_row + col * g.b_col;
                width == W ? pack<W>(panel, b, g.b_col, g.b_row, kc, cols)
                           : pack<kNR>(panel, b, g.b_col, g.b_row, kc, cols);
                for (int64_t t = t0; t < t1; ++t) {
                    const int64_t row = t * kMR, rows = smaller(kMR, g.m - row);
                    const bool packed = t >= packed_from, whole = rows == kMR && cols == width && !follows;
                    const float* a = packed ? own + (t - packed_from) * kMR * kc : g.a + row * g.a_row + k0;
                    const Tile target{g.c + row * g.c_row + col, g.c_row, add ? add + row * add_row + col : nullptr,
                                      add_row};
                    float* to = whole ? nullptr : aside;
                    if (width == kNR)
                        packed ? multiply<kNV, true>(a, 0, panel, kc, target, to)
                               : multiply<kNV, false>(a, g.a_row, panel, kc, target, to);
                    else
                        packed ? multiply<1, true>(a, 0, panel, kc, target, to)
                               : multiply<1, false>(a, g.a_row, panel, kc, target, to);
                    if (!whole) finish(g, aside, width, row, rows, col, cols, first, last);
                }
            }
        }
    }
}

// Into how many parts rows are cut, and columns into threads / that: cycles per step of K, for products and for
// packing, of the thread that has most to do.
int64_t row_parts(const Gemm& g, int64_t threads) {
    const int64_t tiles = ceil_div(g.m, kMR), panels = ceil_div(g.n, kNR);
    int64_t best = threads;
    double least = 0;
    for (int64_t r = threads; r >= 1; --r) {
        if (threads % r) continue;
        const int64_t rows = ceil_div(tiles, r) * kMR, cols = ceil_div(panels, threads / r) * kNR;
        const double cycles = double(rows) * cols / (2 * W) + 0.5 * cols + 0.5 * rows;
        if (r == threads || cycles < least) {
            best = r;
            least = cycles;
        }
    }
    return best;
}

}  // namespace

bool gemm(const Gemm& g) {
    if (g.m == 0 || g.n == 0) return true;
    const int64_t blocks = larger(1, ceil_div(g.k, kBlockK)), block = larger(1, ceil_div(ceil_div(g.k, blocks), 4) * 4);
    const int64_t tiles = ceil_div(g.m, kMR), panels = ceil_div(g.n, kNR);
    const int threads = cpu::thread_count(tiles * panels, g.m * g.n * (g.k / 16 + 1));
    const int64_t own = own_floats(g, block) + kNR * block;
    float* buffer = cpu::workspace(threads * own);
    if (buffer == nullptr) return false;
    const int64_t down = row_parts(g, threads), across = threads / down;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < threads; ++i) {
        const int64_t r = i / across, c = i % across;
        compute(g, block, {tiles * r / down, tiles * (r + 1) / down, panels * c / across, panels * (c + 1) / across},
                buffer + i * own);
    }
    return true;
}

}  // namespace tinygpt::TINYGPT_ISA
