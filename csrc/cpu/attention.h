// What the forward and the backward of attention share: a matrix product of tiles, packing, e^x, the dropout mask.
#pragma once

#include "kernels.h"
#include "memory.h"
#include "simd.h"
#include "threads.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

// A tile of a product has kRows rows and kCols columns: 2 kRows accumulators, two vectors of B and one broadcast
// element of A must fit the registers (16, or 32 with AVX-512).
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#elif defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kCols = 2 * W;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Distance between the rows of a packed matrix: whole tiles, and an odd number of cache lines, so that consecutive rows
// fall into different sets of the first-level cache.
inline int64_t row_pitch(int64_t n) {
    const int64_t lines = round_up(n, kCols > 16 ? kCols : 16) / 16;
    return (lines | 1) * 16;
}

// C (+)= A B for one tile: A is kRows x depth, B depth x kCols, C kRows x kCols. A's rows are a_pitch apart;
// transposed, A is stored as its transpose.
template <bool kTransposed>
inline void multiply(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t depth, float* c,
                     int64_t c_pitch, bool add) {
    vf sum[kRows][2];
    if (add) {
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
            sum[i][0] = load(c + i * c_pitch);
            sum[i][1] = load(c + i * c_pitch + W);
        }
    } else {
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = vf{};
    }
    for (; depth > 0; --depth) {
        const vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
            const vf x = splat(kTransposed ? a[i] : a[i * a_pitch]);
            sum[i][0] += x * b0;
            sum[i][1] += x * b1;
        }
        a += kTransposed ? a_pitch : 1;
        b += b_pitch;
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
        store(c + i * c_pitch, sum[i][0]);
        store(c + i * c_pitch + W, sum[i][1]);
    }
}

inline vf larger(vf a, vf b) {  // b where either is NaN
#if defined(__AVX512F__)
    return bits_as<vf>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b)));
#elif defined(__AVX2__)
    return bits_as<vf>(_mm256_max_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
#elif defined(__SSE2__)
    return bits_as<vf>(_mm_max_ps(bits_as<__m128>(a), bits_as<__m128>(b)));
#else
    return bits_as<vf>(select(a > b, bits_as<vu>(a), bits_as<vu>(b)));
#endif
}

// e^x for x <= 0, to 2e-7 near 0; 0 below -88.03, NaN for NaN. x = (n + r) ln 2 with |r| <= 1/2, a polynomial for 2^r
// (least maximal relative error, exact at 0), and n goes into the exponent's bits. At the clamp r = 0, and the bits
// come out as 0. Half the cost of math.h's exp, which serves any x.
inline vf exp_below(vf x) {
    const vf round = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to integers, which then are the lowest bits
    x = larger(splat(-127.0f), x * splat(1.44269504088896341f));
    const vf shifted = x + round, r = x - (shifted - round);
    vf p = splat(1.3264727e-3f);
    p = p * r + splat(9.671513e-3f);
    p = p * r + splat(5.5507336e-2f);
    p = p * r + splat(2.4022242e-1f);
    p = p * r + splat(6.9314700e-1f);
    p = p * r + splat(1.0f);
    return bits_as<vf>(bits_as<vu>(p) + (bits_as<vu>(shifted) << 23));
}

// log x for normal x > 0, to about one unit in the last place of the result or of 1: x = 2^n m with m around 1, and
// log m = 2 artanh(z) with z = (m - 1) / (m + 1), |z| < 0.172, as its series.
inline vf log_of(vf x) {
    const vu bits = bits_as<vu>(x) - 0x3f3504f3;  // m from sqrt(1/2) to sqrt(2)
    const vf n = __builtin_convertvector(bits_as<vi>(bits) >> 23, vf);
    const vf m = bits_as<vf>((bits & 0x7fffff) + 0x3f3504f3);
    const vf z = (m - splat(1.0f)) / (m + splat(1.0f)), zz = z * z;
    vf p = splat(2.0f / 9.0f);
    p = p * zz + splat(2.0f / 7.0f);
    p = p * zz + splat(2.0f / 5.0f);
    p = p * zz + splat(2.0f / 3.0f);
    p = p * zz + splat(2.0f);
    return p * z + n * splat(0.693147180559945309f);
}

// The largest lane of each of four vectors.
inline v4 tops(const vf* a) {
    v4 top;
    for (int i = 0; i < 4; ++i) {
        float lanes[W], most = a[i][0];
        store(lanes, a[i]);
        for (int lane = 1; lane < W; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
        top[i] = most;
    }
    return top;
}

// n rows of D elements as floats times `factor`.
template <class T>
void pack_rows(const T* source, int64_t stride, int64_t n, int64_t D, float factor, float* target, int64_t pitch) {
    const vf by = splat(factor);
    for (int64_t i = 0; i < n; ++i, source += stride, target += pitch) {
        int64_t d = 0;
        for (; d + W <= D; d += W) store(target + d, load(source + d) * by);
        if (d < D) store(target + d, load_first(source + d, D - d) * by);
    }
}

// The transpose of n rows of D floats as panels of kCols columns: [n / kCols][D][kCols], zeros beyond n.
inline void pack_panels(const float* rows, int64_t stride, int64_t n, int64_t D, float* panels) {
    for (int64_t first = 0; first < n; first += kCols, panels += D * kCols) {
        for (int64_t i = 0; i < kCols; i += 4) {
            const float* row = rows + (first + i) * stride;
            int64_t d = 0;
#if defined(__SSE2__)
            if (first + i + 4 <= n)
                for (; d + 4 <= D; d += 4) {
                    __m128 x[4];
                    for (int j = 0; j < 4; ++j) x[j] = _mm_loadu_ps(row + j * stride + d);
                    _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
                    for (int j = 0; j < 4; ++j) _mm_storeu_ps(panels + (d + j) * kCols + i, x[j]);
                }
#endif
            for (; d < D; ++d)
                for (int64_t j = 0; j < 4; ++j)
                    panels[d * kCols + i + j] = first + i + j < n ? row[j * stride + d] : 0.0f;
        }
    }
}

template <class T>
void pack_panels_from(const T* source, int64_t stride, int64_t n, int64_t D, float* panels, float* rows) {
    const int64_t pitch = round_up(D, W);
    for (int64_t first = 0; first < n; first += kCols) {
        const int64_t count = least(kCols, n - first);
        pack_rows(source + first * stride, stride, count, D, 1.0f, rows, pitch);
        pack_panels(rows, pitch, count, D, panels + first * D);
    }
}
inline void pack_panels_from(const float* source, int64_t stride, int64_t n, int64_t D, float* panels, float*) {
    pack_panels(source, stride, n, D, panels);
}

// One row of results: D floats times `factor`, in the tensor's type, once.
template <class T>
inline void unpack_row(const float* source, int64_t D, float factor, T* target) {
    const vf by = splat(factor);
    int64_t d = 0;
    for (; d + W <= D; d += W) store(target + d, load(source + d) * by);
    if (d < D) store_first(target + d, load(source + d) * by, D - d);
}

// Which weights of row (head, t) dropout keeps, keys s to s + n with s a multiple of 4: 1 or 0 each, four to a Philox
// draw with counter (head, t, key / 4, 0). `out` may be written to the next multiple of 64.
inline void keep_row(const Attention& a, int64_t head, int64_t t, int64_t s, int64_t n, float* out) {
    constexpr int kDraws = 16;  // side by side, so that the compiler computes them as vectors
    for (int64_t first = 0; first < n; first += 4 * kDraws) {
        uint32_t c0[kDraws], c1[kDraws], c2[kDraws], c3[kDraws];
        uint32_t k0 = static_cast<uint32_t>(*a.seed), k1 = static_cast<uint32_t>(*a.seed >> 32);
        for (int i = 0; i < kDraws; ++i) {
            c0[i] = static_cast<uint32_t>(head);
            c1[i] = static_cast<uint32_t>(t);
            c2[i] = static_cast<uint32_t>((s + first) / 4 + i);
            c3[i] = 0;
        }
        for (int round = 0; round < 10; ++round) {
            for (int i = 0; i < kDraws; ++i) {
                const uint64_t m0 = uint64_t{0xD2511F53} * c0[i], m1 = uint64_t{0xCD9E8D57} * c2[i];
                c0[i] = static_cast<uint32_t>(m1 >> 32) ^ c1[i] ^ k0;
                c1[i] = static_cast<uint32_t>(m1);
                c2[i] = static_cast<uint32_t>(m0 >> 32) ^ c3[i] ^ k1;
                c3[i] = static_cast<uint32_t>(m0);
            }
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        const uint32_t drop_below = a.drop_below;
        for (int i = 0; i < kDraws; ++i) {
            out[first + 4 * i] = c0[i] >= drop_below;
            out[first + 4 * i + 1] = c1[i] >= drop_below;
            out[first + 4 * i + 2] = c2[i] >= drop_below;
            out[first + 4 * i + 3] = c3[i] >= drop_below;
        }
    }
}

// What one batch row shows: how many keys are valid, and how many of them each query sees.
struct Sight {
    int64_t valid, T;
    bool causal;

    Sight(const Attention& a, int64_t b) : valid(a.S), T(a.T), causal(a.causal) {
        if (a.kv_lengths) valid = most(0, least(a.S, a.kv_lengths[b]));
    }
    int64_t keys(int64_t t) const { return causal ? most(0, least(valid, t + 1 + valid - T)) : valid; }
    int64_t first_query(int64_t s) const { return causal ? most(0, s - valid + T) : 0; }  // that sees key s
};

template <class T>
inline const T* at(const Heads& x, int64_t b, int64_t token, int64_t head) {
    return static_cast<const T*>(x.data) + b * x.batch + token * x.token + head * x.head;
}
template <class T>
inline T* at(const HeadsOut& x, int64_t b, int64_t token, int64_t head) {
    return static_cast<T*>(x.data) + b * x.batch + token * x.token + head * x.head;
}

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
