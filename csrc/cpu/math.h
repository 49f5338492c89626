// Elementary functions of vectors, to about one unit in the last place; NaN stays NaN.
#pragma once

#include "simd.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

// c[0] + c[1] x + c[2] x^2 + ...
template <int N>
inline vf polynomial(const float (&c)[N], vf x) {
    vf p = splat(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) p = p * x + splat(c[i]);
    return p;
}

// e^x. x = n ln 2 + r with |r| <= ln 2 / 2: a polynomial for e^r (Cephes' expf), and n goes into the exponent's bits.
// ln 2 in two parts keeps r exact. Below -86.98 the result would be subnormal or nearly: 0 stands for it, as for -inf.
inline vf exp(vf x) {
    constexpr float kLow = -86.98f, kHigh = 89.0f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
    const vf inside = minimum(splat(kHigh), maximum(splat(kLow), x));     // NaN passes: it is the second operand
    const vf rounded = inside * splat(1.44269504088896341f) + splat(kRound), n = rounded - splat(kRound);
    const vf r = (inside - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
    constexpr float c[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                           8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
    const vf p = polynomial(c, r) * r * r + r + splat(1.0f);
    // The integer n stands in the low bits of `rounded`. 2^n in two steps: n = 128 has no exponent of its own, and
    // gives infinity only where p is not below 1.
    const vf y = (p + p) * bits_as<vf>((bits_as<vu>(rounded) + 126) << 23);
    return choose(x < splat(kLow), vf{}, y);
}

// e^x of N vectors for kExpLow <= x <= 88, at half the cost: no limits to watch, a polynomial of degree 5 with a
// relative error of 1.1e-7, and 2^n comes out of the rounding itself, whose low bits hold n + 127. NaN stays NaN;
// beyond the limits the result is anything. Two at a time go through in 4 cycles each, one by one in 5 (Zen 3).
constexpr float kExpLow = -87.33f;
template <int N>
inline void exp_within(vf (&x)[N]) {
    constexpr float kRound = 12582912.0f + 127.0f;
    constexpr float c[] = {1.0f, 1.0f, 4.9999230305e-1f, 1.6667115390e-1f, 4.1890332183e-2f, 8.3125014318e-3f};
    vf rounded[N], p[N];
    for (int k = 0; k < N; ++k) rounded[k] = x[k] * splat(1.44269504088896341f) + splat(kRound);
    for (int k = 0; k < N; ++k) {
        const vf n = rounded[k] - splat(kRound);
#if defined(__FMA__) || defined(__aarch64__)
        x[k] = x[k] - n * splat(0.693147180559945309f);  // the product is not rounded
#else
        x[k] = (x[k] - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
#endif
    }
    for (int k = 0; k < N; ++k) p[k] = splat(c[5]);
    for (int i = 4; i >= 0; --i)
        for (int k = 0; k < N; ++k) p[k] = p[k] * x[k] + splat(c[i]);
    for (int k = 0; k < N; ++k) x[k] = p[k] * bits_as<vf>(bits_as<vu>(rounded[k]) << 23);
}

// The natural logarithm of normal numbers above 0 (Cephes' logf); NaN stays NaN.
inline vf log(vf x) {
    const vi u = bits_as<vi>(x), e = (u - 0x3f3504f3) >> 23;  // x = m 2^e with m from sqrt(1/2) to sqrt(2)
    const vf f = bits_as<vf>(u - (e << 23)) - splat(1.0f), n = __builtin_convertvector(e, vf);
    constexpr float c[] = {3.3333331174e-1f,  -2.4999993993e-1f, 2.0000714765e-1f,  -1.6668057665e-1f, 1.4249322787e-1f,
                           -1.2420140846e-1f, 1.1676998740e-1f,  -1.1514610310e-1f, 7.0376836292e-2f};
    const vf square = f * f, y = square * f * polynomial(c, f) - n * splat(2.12194440e-4f) - square * splat(0.5f);
    return choose(x == x, y + f + n * splat(0.693359375f), x);
}

inline vf sqrt(vf x) {
#if defined(__AVX512F__)
    return bits_as<vf>(_mm512_sqrt_ps(bits_as<__m512>(x)));
#elif defined(__AVX2__)
    return bits_as<vf>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#elif defined(__SSE2__)
    return bits_as<vf>(_mm_sqrt_ps(bits_as<__m128>(x)));
#elif defined(__aarch64__)
    return bits_as<vf>(vsqrtq_f32(bits_as<float32x4_t>(x)));
#else
    vf y;
    for (int i = 0; i < W; ++i) y[i] = __builtin_sqrtf(x[i]);
    return y;
#endif
}

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
