// Half-precision storage types and their conversions, branch-free so that loops over them
// vectorise. Rounding is to nearest even; NaN stays NaN.
#pragma once

#include <cstring>

#include "config.h"

namespace dat {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

inline namespace DAT_SIMD {

template <class To, class From>
DAT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

DAT_HD float to_acc(float x) { return x; }
DAT_HD double to_acc(double x) { return x; }
DAT_HD float to_acc(bfloat16_t x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
DAT_HD float to_acc(half_t x) {
  // Exponent and mantissa moved to float's places are 2^112 too small; what then reaches 2^16 was
  // infinite or NaN and takes float's exponent of those.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000)
                                                                     << 16;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : scaled;
  return bit_cast<float>(special | sign);
}

template <class To>
DAT_HD To from_acc(double x) {
  return To(x);
}
template <class To>
DAT_HD To from_acc(float x) {
  return To(x);
}
template <>
DAT_HD bfloat16_t from_acc<bfloat16_t>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
DAT_HD half_t from_acc<half_t>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000,
                 abs = bits & 0x7fffffffu;
  // Normal halves: round the mantissa to 10 bits in the integer domain.
  const uint32_t normal = (abs - 0x38000000u + 0xfff + ((abs >> 13) & 1)) >> 13;
  // Subnormal halves: adding 0.5 aligns the mantissa, and the addition rounds.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(abs) + 0.5f) - 0x3f000000u;
  uint32_t result = abs < 0x38800000u ? subnormal : normal;
  result = abs >= 0x477ff000u ? 0x7c00u : result;
  result = abs > 0x7f800000u ? 0x7e00u : result;
  return {uint16_t(result | sign)};
}

}  // namespace DAT_SIMD

// Type in which a storage type is computed with.
template <class S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class S>
using acc_t = typename Accumulate<S>::type;

}  // namespace dat
