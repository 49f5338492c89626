// GELU and its derivative for vectors, exact and tanh form: gelu<TANH>(z), gelu_derivative<TANH>(z).
//
// gelu(z) = z (1/2 + s(z)) and gelu'(z) = 1/2 + t(z), where s and t are odd and smooth: s(z) = Φ(z) - 1/2, t = s + z
// s'. An odd function is z times a function of u = z^2, here a quotient of two polynomials in u: no exponential, no
// erf, no tanh, and one division, which overlaps with the polynomials of the next vector (measured on AVX2: 0.48 ns an
// element, against 1.24 for one exponential of a polynomial, the form of the Triton kernel). Each quotient has the
// least largest absolute error over 0 <= z <= limit that its degrees allow (reweighted least squares in float64): below
// 7e-9 in s and t, so what float32 loses in evaluating them (2.5e-7 at most; PyTorch's own op loses as much) is nearly
// all the error there is. Beyond the limit s and t are +-1/2, exactly: gelu(-1e30) is -0 and not 1e30 times a rounding
// error.
//
// As everywhere else gelu(-inf) is NaN (-inf * 0) and NaN stays NaN; gelu'(-inf) is 0 and gelu'(inf) 1, the limits.
#pragma once

#include "math.h"

namespace tinygpt::TINYGPT_ISA {
namespace {

// z P(u) / Q(u) for u = z^2 <= limit, lowest coefficient first.
template <int M, int N>
struct OddQuotient {
    float limit, p[M + 1], q[N + 1];

    vf operator()(vf z, vf u) const { return z * polynomial(p, u) / polynomial(q, u); }
};

constexpr OddQuotient<5, 5> kGelu[2] = {
    {29.16f,
     {7.10615873e-01f, 5.94443604e-02f, 8.28433409e-03f, 2.92698882e-04f, 1.13287988e-05f, 4.16576142e-08f},
     {1.78125000e+00f, 4.45878893e-01f, 5.05495816e-02f, 3.31131555e-03f, 1.28963147e-04f, 2.16705348e-06f}},
    {27.04f,
     {4.36343163e-01f, 3.31365131e-02f, 3.97140300e-03f, 1.45324724e-04f, 7.73220927e-06f, 2.65528257e-08f},
     {1.09375000e+00f, 2.66255707e-01f, 2.65797433e-02f, 1.41732907e-03f, 8.27553158e-05f, 1.44775902e-06f}},
};

constexpr OddQuotient<7, 6> kGeluDerivative[2] = {
    {36.0f,
     {1.09709120e+00f, -2.48019509e-02f, 1.86573770e-02f, 3.92188987e-04f, 4.40373406e-05f, 1.54267650e-06f,
      1.78793353e-08f, -3.97105474e-11f},
     {1.37500000e+00f, 4.27248031e-01f, 6.26764968e-02f, 5.70656871e-03f, 3.55584925e-04f, 1.48668987e-05f,
      5.00004944e-07f}},
    {30.25f,
     {1.17189288e+00f, -7.67544284e-02f, 2.00258866e-02f, -4.82658448e-04f, 4.41723278e-05f, -5.37347722e-09f,
      1.43340193e-08f, -5.50755101e-11f},
     {1.46875000e+00f, 3.95808905e-01f, 4.50138859e-02f, 2.41516624e-03f, 1.75557128e-04f, 5.37966798e-06f,
      1.94910399e-07f}},
};

template <bool TANH>
inline vf gelu(vf z) {
    // Beyond the limit the quotient stays what it is there, 1 / (2 |z at the limit|), and |z| grows: s meets its bound.
    const vf s = kGelu[TANH](z, minimum(z * z, splat(kGelu[TANH].limit)));
    return z * (splat(0.5f) + minimum(splat(0.5f), maximum(splat(-0.5f), s)));
}

template <bool TANH>
inline vf gelu_derivative(vf z) {
    const vf u = z * z, limit = splat(kGeluDerivative[TANH].limit);
    const vf t = kGeluDerivative[TANH](z, minimum(u, limit));
    const vf bound = bits_as<vf>((bits_as<vu>(z) & 0x80000000u) | bits_as<vu>(splat(0.5f)));
    return splat(0.5f) + choose(u > limit, bound, t);
}

}  // namespace
}  // namespace tinygpt::TINYGPT_ISA
