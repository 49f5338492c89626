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

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
