// Bilinear interpolation: the cell a coordinate falls into, and the value with its derivatives.
#pragma once

#include "config.h"

namespace dat {
inline namespace DAT_SIMD {

// Coordinate t on an axis of `size` cells = cell index + fraction. Taps `index` and `index + 1`
// outside [0, size) count as zero. Far coordinates are brought to [-2, size] before they become
// integers, where both taps are outside: huge and infinite ones are safe. NaN: index -2, and the
// fraction stays NaN so that whatever depends on it does, too.
template <class T>
struct Cell {
  int index;
  T fraction;
};

template <class T>
DAT_HD Cell<T> cell_of(T t, int64_t size) {
  const T lower = T(-2), upper = T(size);
  const T clamped = t < lower ? lower : (t > upper ? upper : t);
  const T floored = std::floor(clamped);
  return {floored == floored ? int(floored) : -2, clamped - floored};
}

// Value between a (fraction 0) and b (fraction 1); its derivative in the fraction is b - a.
template <class V>
DAT_HD V lerp(V a, V b, V fraction) {
  return a + fraction * (b - a);
}

// The four taps around a point, [y][x], blended; with the derivatives in the coordinates.
template <class T>
struct Bilinear {
  T value, d_y, d_x;
};

template <class T>
DAT_HD Bilinear<T> bilinear(T t00, T t01, T t10, T t11, T fy, T fx) {
  const T top = lerp(t00, t01, fx), bottom = lerp(t10, t11, fx);
  return {lerp(top, bottom, fy), bottom - top, lerp(t01 - t00, t11 - t10, fy)};
}

// Weight of each tap: what the value's gradient adds to that tap's gradient. [y][x]
template <class T>
struct TapWeights {
  T w00, w01, w10, w11;
};

template <class T>
DAT_HD TapWeights<T> tap_weights(T fy, T fx) {
  return {(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx};
}

}  // namespace DAT_SIMD
}  // namespace dat
