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
inline vu select(vi condition, vu a, vu b) { return (vu(condition) & a) | (~vu(condition) & b); }

typedef float v4 __attribute__((vector_size(16)));

// The sums of four vectors at once: a horizontal sum is a chain of shuffles, and four chains cost little more than one.
inline v4 sums(const vf* a) {
#if defined(__SSE2__)
    __m128 part[4];
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
        const __m512 whole = bits_as<__m512>(a[i]);
        const __m256 folded = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
        part[i] = _mm_add_ps(_mm256_castps256_ps128(folded), _mm256_extractf128_ps(folded, 1));
#elif defined(__AVX2__)
        const __m256 whole = bits_as<__m256>(a[i]);
        part[i] = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
#else
        part[i] = bits_as<__m128>(a[i]);
#endif
    }
    _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
    return bits_as<v4>(_mm_add_ps(_mm_add_ps(part[0], part[1]), _mm_add_ps(part[2], part[3])));
#else
    v4 total = {};
    for (int i = 0; i < 4; ++i)
        for (int lane = 0; lane < W; ++lane) total[i] += a[i][lane];
    return total;
#endif
}

// Lanes below n as they are, the others 0.
inline vf keep(vf a, int64_t n) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return bits_as<vf>(select(lane < vi{} + static_cast<int32_t>(n), bits_as<vu>(a), vu{}));
}

inline vf widen(vf a) { return a; }

inline vf widen_bfloat(vh a) { return bits_as<vf>(__builtin_convertvector(a, vu) << 16); }

inline vh narrow_bfloat(vf a) {
    vu u = bits_as<vu>(a);
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(select((u & 0x7fffffff) > 0x7f800000, (u >> 16) | 0x40, rounded), vh);
}

inline vf widen_half(vh a) {
#if defined(__AVX512F__)
    return bits_as<vf>(_mm512_cvtph_ps(bits_as<__m256i>(a)));
#elif defined(__F16C__)
    return bits_as<vf>(_mm256_cvtph_ps(bits_as<__m128i>(a)));
#else
    // Shift exponent and mantissa into place; a multiplication by 2^112 rebases the exponent, of subnormals too.
    vu u = __builtin_convertvector(a, vu);
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
#else
    vu u = bits_as<vu>(a), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    // Normal: rebase the exponent and round half to even. Subnormal: adding 1/2 lets the addition itself round.
    vu normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
    vu subnormal = bits_as<vu>(bits_as<vf>(u) + splat(0.5f)) - 0x3f000000;
    vu result = select(u < 0x38800000, subnormal, normal);
    result = select(u >= 0x477ff000, vu{} + 0x7c00, result);
    result = select(u > 0x7f800000, vu{} + 0x7e00, result);
    return __builtin_convertvector(result | sign, vh);
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

// The first n < W elements; the other lanes are 0.
template <class T>
inline vf load_first(const T* p, int64_t n) {
    T parts[W] = {};
    std::memcpy(parts, p, n * sizeof(T));
    return load(parts);
}
template <class T>
inline void store_first(T* p, vf a, int64_t n) {
    T parts[W];
    store(parts, a);
    std::memcpy(p, parts, n * sizeof(T));
}

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
