// The exponential of the softmax, in base 2: scores are multiplied by log2(e) once, with the scale.
#pragma once

#include "config.h"

namespace dat {
inline namespace DAT_SIMD {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// 2^f for f in [-1/2, 1/2] by Horner's rule, for scalars and vectors V of T.
// float: degree 5, minimax in relative error (7.5e-8). double: the Taylor series to degree 13
// (4e-18).
template <class T, class V>
DAT_HD V exp2_fraction(V f) {
  if constexpr (sizeof(T) == 4) {
    V p = f * T(0.00132764721678) + T(0.00967554133102);
    p = p * f + T(0.0555071327288);
    p = p * f + T(0.24022119724);
    p = p * f + T(0.693146967065);
    return p * f + T(1.00000007165);
  } else {
    T coefficient[14] = {1};
    for (int i = 1; i < 14; ++i) coefficient[i] = coefficient[i - 1] * T(kLn2) / i;
    V p = f * coefficient[13] + coefficient[12];
    for (int i = 11; i >= 0; --i) p = p * f + coefficient[i];
    return p;
  }
}

// log2((1 + z) / (1 - z)) for |z| <= 0.1716, which covers mantissas in [sqrt(1/2), sqrt(2)]: the
// odd series in z to the order that leaves 3e-10 (float) or 1e-18 (double).
template <class T, class V>
DAT_HD V log2_ratio(V z) {
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 12;
  const V z2 = z * z;
  V sum = z2 * T(0) + T(1) / (2 * kTerms - 1);
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * z2 + T(1) / (2 * i + 1);
  return z * sum * T(2 * kLog2e);
}

// A score in natural units as an exponent of 2, for scalars and vectors V of T; finite ones stay
// finite.
template <class V, class T = V>
DAT_HD V as_exponent(V score) {
  const V most = V{} + (sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.7976931348623157e308));
  const V exponent = score * T(kLog2e);
  const V bounded = exponent > most ? most : exponent < -most ? -most : exponent;
  return (score <= most) & (score >= -most) ? bounded : exponent;
}

// Gradient of a score (in natural units) from its probability, the gradient that reaches the
// probability, and the row's sum of probability times that, which is grad_out * out.
template <class V>
DAT_HD V softmax_vjp(V probability, V grad_probability, V row_sum) {
  return probability * (grad_probability - row_sum);
}

}  // namespace DAT_SIMD
}  // namespace dat
