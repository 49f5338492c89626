// Vectors of floats in GCC's and Clang's vector extensions, as wide as the instruction set this file is compiled for,
// and loads and stores that convert from and to fp16 and bf16. Included by kernel sources only, inside a namespace per
// instruction set and with internal linkage: a shared inline function compiled for AVX-512 could be the copy the linker
// keeps, and would then stop a machine that has none.
#pragma once

#include <cstdint>
#include <cstring>

#include "../ops.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tinygpt::TINYGPT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint64_t vq __attribute__((vector_size(W * 2)));

struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline vf splat(float a) { return a - vf{}; }

// Lane by lane a where the condition holds, else b.
inline vu select(vi condition, vu a, vu b) { return condition ? a : b; }
inline vf choose(vi condition, vf a, vf b) { return condition ? a : b; }

// a > b ? a : b, and a < b ? a : b: where one of the two is NaN, b. (GCC would turn a constant a around, and then needs
// two instructions for x86's one.)
#if defined(__AVX512F__)
inline vf maximum(vf a, vf b) { return bits_as<vf>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b))); }
inline vf minimum(vf a, vf b) { return bits_as<vf>(_mm512_min_ps(bits_as<__m512>(a), bits_as<__m512>(b))); }
#elif defined(__AVX2__)
inline vf maximum(vf a, vf b) { return bits_as<vf>(_mm256_max_ps(bits_as<__m256>(a), bits_as<__m256>(b))); }
inline vf minimum(vf a, vf b) { return bits_as<vf>(_mm256_min_ps(bits_as<__m256>(a), bits_as<__m256>(b))); }
#elif defined(__SSE2__)
inline vf maximum(vf a, vf b) { return bits_as<vf>(_mm_max_ps(bits_as<__m128>(a), bits_as<__m128>(b))); }
inline vf minimum(vf a, vf b) { return bits_as<vf>(_mm_min_ps(bits_as<__m128>(a), bits_as<__m128>(b))); }
#else
inline vf maximum(vf a, vf b) { return a > b ? a : b; }
inline vf minimum(vf a, vf b) { return a < b ? a : b; }
#endif

typedef float v4 __attribute__((vector_size(16)));

// Four vectors at once, folded to four numbers: a fold across lanes is a chain of shuffles, and four chains cost little
// more than one. `fold` takes two vectors (v4 or wider) and combines them lane by lane.
template <class Fold>
inline v4 fold_lanes(const vf* a, Fold fold) {
    v4 part[4];
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
        typedef float v8 __attribute__((vector_size(32)));
        const __m512 whole = bits_as<__m512>(a[i]);
        const v8 half = fold(bits_as<v8>(_mm512_castps512_ps256(whole)), bits_as<v8>(_mm512_extractf32x8_ps(whole, 1)));
        part[i] = fold(bits_as<v4>(_mm256_castps256_ps128(bits_as<__m256>(half))),
                       bits_as<v4>(_mm256_extractf128_ps(bits_as<__m256>(half), 1)));
#elif defined(__AVX2__)
        const __m256 whole = bits_as<__m256>(a[i]);
        part[i] = fold(bits_as<v4>(_mm256_castps256_ps128(whole)), bits_as<v4>(_mm256_extractf128_ps(whole, 1)));
#else
        part[i] = a[i];
#endif
    }
#if defined(__SSE2__)
    __m128 column[4];
    for (int i = 0; i < 4; ++i) column[i] = bits_as<__m128>(part[i]);
    _MM_TRANSPOSE4_PS(column[0], column[1], column[2], column[3]);
    for (int i = 0; i < 4; ++i) part[i] = bits_as<v4>(column[i]);
#elif defined(__aarch64__)
    float32x4_t row[4];
    for (int i = 0; i < 4; ++i) row[i] = bits_as<float32x4_t>(part[i]);
    const float32x4x2_t top = vtrnq_f32(row[0], row[1]), low = vtrnq_f32(row[2], row[3]);
    for (int i = 0; i < 2; ++i) {
        part[i] = bits_as<v4>(vcombine_f32(vget_low_f32(top.val[i]), vget_low_f32(low.val[i])));
        part[2 + i] = bits_as<v4>(vcombine_f32(vget_high_f32(top.val[i]), vget_high_f32(low.val[i])));
    }
#else
    v4 column[4];
    for (int i = 0; i < 4; ++i) column[i] = v4{part[0][i], part[1][i], part[2][i], part[3][i]};
    for (int i = 0; i < 4; ++i) part[i] = column[i];
#endif
    return fold(fold(part[0], part[1]), fold(part[2], part[3]));
}

// The sums, and the largest lanes, of four vectors.
inline v4 sums(const vf* a) {
    return fold_lanes(a, [](auto p, auto q) { return p + q; });
}
inline v4 maxima(const vf* a) {
    return fold_lanes(a, [](auto p, auto q) { return p > q ? p : q; });
}

// Of one vector, where there are no four.
template <class Fold>
inline float fold_one(vf a, Fold fold) {
#if defined(__AVX512F__)
    typedef float v8 __attribute__((vector_size(32)));
    const __m512 whole = bits_as<__m512>(a);
    const __m256 wide = bits_as<__m256>(
        fold(bits_as<v8>(_mm512_castps512_ps256(whole)), bits_as<v8>(_mm512_extractf32x8_ps(whole, 1))));
#elif defined(__AVX2__)
    const __m256 wide = bits_as<__m256>(a);
#endif
#if defined(__AVX2__)
    v4 part = fold(bits_as<v4>(_mm256_castps256_ps128(wide)), bits_as<v4>(_mm256_extractf128_ps(wide, 1)));
#else
    v4 part = a;
#endif
    part = fold(part, v4{part[2], part[3], part[0], part[1]});
    part = fold(part, v4{part[1], part[0], part[3], part[2]});
    return part[0];
}
inline float sum(vf a) {
    return fold_one(a, [](auto p, auto q) { return p + q; });
}
inline float largest(vf a) {
    return fold_one(a, [](auto p, auto q) { return p > q ? p : q; });
}

// All bits set in the lanes below n.
inline vi first_lanes(int64_t n) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane < vi{} + static_cast<int32_t>(n);
}

// Lanes below n as they are, the others 0.
inline vf keep(vf a, int64_t n) { return choose(first_lanes(n), a, vf{}); }

// 16 bits to 32 and back, the upper 16 being zero: GCC makes more instructions of __builtin_convertvector.
inline vu widen_words(vh a) {
#if defined(__AVX512F__)
    return bits_as<vu>(_mm512_cvtepu16_epi32(bits_as<__m256i>(a)));
#elif defined(__AVX2__)
    return bits_as<vu>(_mm256_cvtepu16_epi32(bits_as<__m128i>(a)));
#else
    return __builtin_convertvector(a, vu);
#endif
}
inline vh narrow_words(vu a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i pairs = _mm256_packus_epi32(bits_as<__m256i>(a), bits_as<__m256i>(a));
    return bits_as<vh>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0b1000)));
#else
    return __builtin_convertvector(a, vh);
#endif
}

inline vf widen_bfloat(vh a) { return bits_as<vf>(widen_words(a) << 16); }

inline vh narrow_bfloat(vf a) {
    const vu u = bits_as<vu>(a), high = u >> 16, rounded = (u + 0x7fff + (high & 1)) >> 16;
    return narrow_words(select(a == a, rounded, high | 0x40));
}

inline vf widen_half(vh a) {
#if defined(__AVX512F__)
    return bits_as<vf>(_mm512_cvtph_ps(bits_as<__m256i>(a)));
#elif defined(__F16C__)
    return bits_as<vf>(_mm256_cvtph_ps(bits_as<__m128i>(a)));
#elif defined(__aarch64__)
    return bits_as<vf>(vcvt_f32_f16(bits_as<float16x4_t>(a)));
#else
    // Shift exponent and mantissa into place; a multiplication by 2^112 rebases the exponent, of subnormals too.
    vu u = widen_words(a);
    vu magnitude = bits_as<vu>(bits_as<vf>((u & 0x7fff) << 13) * splat(0x1p112f));
    magnitude = select((u & 0x7c00) == 0x7c00, magnitude | 0x7f800000, magnitude);
    return bits_as<vf>(magnitude | ((u & 0x8000) << 16));
#endif
}

inline vh narrow_half(vf a) {
#if defined(__AVX512F__)
    return bits_as<vh>(_mm512_cvtps_ph(bits_as<__m512>(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    return bits_as<vh>(_mm256_cvtps_ph(bits_as<__m256>(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
    return bits_as<vh>(vcvt_f16_f32(bits_as<float32x4_t>(a)));
#else
    vu u = bits_as<vu>(a), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    // Normal: rebase the exponent and round half to even. Subnormal: adding 1/2 lets the addition itself round.
    vu normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
    vu subnormal = bits_as<vu>(bits_as<vf>(u) + splat(0.5f)) - 0x3f000000;
    vu result = select(u < 0x38800000, subnormal, normal);
    result = select(u >= 0x477ff000, vu{} + 0x7c00, result);
    result = select(u > 0x7f800000, vu{} + 0x7e00, result);
    return narrow_words(result | sign);
#endif
}

inline vf load(const float* p) {
    vf a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline vf load(const bfloat* p) {
    vh a;
    std::memcpy(&a, p, sizeof a);
    return widen_bfloat(a);
}
inline vf load(const half* p) {
    vh a;
    std::memcpy(&a, p, sizeof a);
    return widen_half(a);
}

inline void store(float* p, vf a) { std::memcpy(p, &a, sizeof a); }
inline void store(bfloat* p, vf a) {
    vh b = narrow_bfloat(a);
    std::memcpy(p, &b, sizeof b);
}
inline void store(half* p, vf a) {
    vh b = narrow_half(a);
    std::memcpy(p, &b, sizeof b);
}

// What `load` gives back of a vector that `store` put to a T.
inline vf stored(const float*, vf a) { return a; }
inline vf stored(const bfloat*, vf a) { return widen_bfloat(narrow_bfloat(a)); }
inline vf stored(const half*, vf a) { return widen_half(narrow_half(a)); }

// n < W elements, in pieces whose sizes the compiler knows: a call of memcpy would cost more than the rest of a short
// row.
template <class T>
inline void copy_first(T* to, const T* from, int64_t n) {
    int64_t done = 0;
    if constexpr (W > 8)
        if (n & 8) std::memcpy(to, from, 8 * sizeof(T)), done = 8;
    if constexpr (W > 4)
        if (n & 4) std::memcpy(to + done, from + done, 4 * sizeof(T)), done += 4;
    if (n & 2) std::memcpy(to + done, from + done, 2 * sizeof(T)), done += 2;
    if (n & 1) to[done] = from[done];
}

// n < 4 elements of two bytes, the first in the lowest bits.
template <class T>
inline uint64_t packed(const T* p, int64_t n) {
    uint32_t pair = 0;
    if (n & 2) std::memcpy(&pair, p, sizeof pair);
    return n & 1 ? pair | uint64_t{p[n & 2].bits} << 16 * (n & 2) : pair;
}

// The first n < W elements; the other lanes are 0, and nothing beyond the n is touched. What narrow stores have just
// written is not there yet for a wide load (9 ns on Zen 3 for one short row's end): so no array is filled on the way.
inline vf load_first(const float* p, int64_t n) {
#if defined(__AVX512F__) && !defined(TINYGPT_SANITIZED)
    return bits_as<vf>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
#elif defined(__AVX2__) && !defined(TINYGPT_SANITIZED)
    return bits_as<vf>(_mm256_maskload_ps(p, bits_as<__m256i>(first_lanes(n))));
#else
    float parts[W] = {};
    copy_first(parts, p, n);
    return load(parts);
#endif
}
template <class T>
inline vf load_first(const T* p, int64_t n) {
    vq parts = {};
    for (int i = 0; i < W / 4; ++i) {
        uint64_t part = 0;
        if (n >= 4 * i + 4)
            std::memcpy(&part, p + 4 * i, sizeof part);
        else if (n > 4 * i)
            part = packed(p + 4 * i, n - 4 * i);
        parts[i] = part;
    }
    return load(reinterpret_cast<const T*>(&parts));
}
// A masked store of AVX2 costs Zen 3 more than these pieces (5 ns against 1 to 2); they are read where one store wrote.
template <class T>
inline void store_first(T* p, vf a, int64_t n) {
#if defined(__AVX512F__) && !defined(TINYGPT_SANITIZED)
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (1u << n) - 1, bits_as<__m512>(a));
#endif
    T parts[W];
    store(parts, a);
    copy_first(p, parts, n);
}

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
