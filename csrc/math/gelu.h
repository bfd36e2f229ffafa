// The normal distribution, which GELU(x) = x cdf(x) is made of.
#pragma once

#include "config.h"

namespace dat {
inline namespace DAT_SIMD {

// The density is this times e^(-x^2 / 2).
constexpr double kInverseRootTwoPi = 0.39894228040143267794;

// cdf(-a) e^(a^2 / 2) for a >= 0, for scalars and vectors V of float: a polynomial in
// 1 / (1 + kMillsStep a), minimax in relative error (1.5e-7) up to a = 14, where the tail leaves
// float's range.
constexpr float kMillsStep = 0.3f;

template <class V>
DAT_HD V mills_ratio(V a) {
  const V t = 1.0f / (a * kMillsStep + 1.0f);
  V p = t * 0.0356879511f - 0.157257953f;
  p = p * t + 0.206447961f;
  p = p * t - 0.0537704629f;
  p = p * t + 0.128607475f;
  p = p * t + 0.0998996308f;
  p = p * t + 0.120756171f;
  p = p * t + 0.119629155f;
  return p * t;
}

// GELU and its derivative from the cumulative and the density of the normal distribution.
template <class V>
DAT_HD V gelu(V x, V cumulative) {
  return x * cumulative;
}
template <class V>
DAT_HD V gelu_slope(V x, V cumulative, V density) {
  return cumulative + x * density;
}

}  // namespace DAT_SIMD
}  // namespace dat
