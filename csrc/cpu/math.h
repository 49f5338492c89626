// Elementary functions of vectors, to about one unit in the last place; NaN stays NaN.
#pragma once

#include "simd.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

inline vf choose(vi condition, vf a, vf b) { return condition ? a : b; }

// Where either is NaN the result is b. GCC makes two instructions of the conditional expression, x86 has one.
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

// c[0] + c[1] x + c[2] x^2 + ...
template <int N>
inline vf polynomial(const float (&c)[N], vf x) {
    vf p = splat(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) p = p * x + splat(c[i]);
    return p;
}

// e^x. x = n ln 2 + r with |r| <= ln 2 / 2: a polynomial for e^r (Cephes' expf), and n goes into the exponent's bits.
// ln 2 in two parts keeps r exact. Below -87.33 the result would be subnormal: 0 stands for it, as for -inf.
inline vf exp(vf x) {
    constexpr float kLow = -87.33f, kHigh = 88.72f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
    const vf inside = choose(x < splat(kHigh), choose(x > splat(kLow), x, splat(kLow)), splat(kHigh));
    const vf n = (inside * splat(1.44269504088896341f) + splat(kRound)) - splat(kRound);
    const vf r = (inside - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    // 2^n in two halves: n = 128 has no exponent of its own.
    const vi k = __builtin_convertvector(n, vi), half = k >> 1;
    const vf y = p * bits_as<vf>((half + 127) << 23) * bits_as<vf>((k - half + 127) << 23);
    const vf clipped = choose(x > splat(kHigh), splat(__builtin_inff()), choose(x < splat(kLow), vf{}, y));
    return choose(x != x, x, clipped);
}

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
