// Where things are: reference points, bounded offsets, and positions as map and table coordinates.
//
// Coordinates come in the order (y, x) everywhere; every function here serves one axis. A position
// lives in [-1, 1] across the map, with align_corners: -1 is the first cell's centre and +1 the
// last one's. Positions may leave that range.
#pragma once

#include "config.h"

namespace dat {

enum class Version : int { dat = 0, datpp = 1 };

inline namespace DAT_SIMD {

// Distance that separates K reference points, as the published versions divide: by K (2022) or by
// K - 1 (2023), which is taken as 1 for K = 1.
template <class T>
DAT_HD T reference_divisor(int64_t K, Version version) {
  return version == Version::dat ? T(K) : T(K > 1 ? K - 1 : 1);
}

// Reference point i of K. K = 1: the centre, 0.
template <class T>
DAT_HD T reference_point(int64_t i, int64_t K, Version version) {
  return (T(i) + T(0.5)) / reference_divisor<T>(K, version) * 2 - 1;
}

// Hyperbolic tangent, from the one function that keeps its digits near 0.
template <class T>
DAT_HD T tanh_of(T x) {
  const T e = std::expm1(-2 * std::abs(x)), t = -e / (2 + e);
  return x < 0 ? -t : t;
}

template <class T>
struct BoundedPosition {
  T pos;
  T slope;  // d pos / d offset
};

// Reference point plus offset, bounded as `factor` says (positive, zero or negative).
template <class T>
DAT_HD BoundedPosition<T> bound_offset(T offset, T reference, T factor, int64_t K,
                                       Version version) {
  if (factor > 0 || (factor == 0 && version == Version::datpp)) {
    const T range = factor / reference_divisor<T>(K, version);
    const T t = tanh_of(offset);
    return {reference + t * range, (1 - t * t) * range};
  }
  const T z = reference + offset;
  if (factor == 0) return {z, T(1)};
  if (version == Version::dat) {
    const T t = tanh_of(z);
    return {t, 1 - t * t};
  }
  // Written so that NaN passes through.
  const T clamped = z < -1 ? T(-1) : (z > 1 ? T(1) : z);
  return {clamped, T(z >= -1 && z <= 1)};
}

// Position -> cell coordinate on a map of `size` cells; an infinite position is outside any map.
template <class T>
DAT_HD T map_coordinate(T pos, int64_t size) {
  return std::isinf(pos) ? pos : (pos + 1) * (T(0.5) * T(size - 1));
}

// d map_coordinate / d pos.
template <class T>
DAT_HD T map_coordinate_slope(int64_t size) {
  return T(0.5) * T(size - 1);
}

// Query i of L on a lattice, seen from a key at pos, meets the bias table at the coordinate
//   t(i) = (size - 1) / 4 * (q_grid(i) - pos + 2) = slope * i + shift(pos),
// with q_grid(i) = (2 i + 1) / L - 1 (2022) or 2 i / (L - 1) - 1 (2023; 0 for L = 1).
// The slope is exactly 1 for dat++ at training resolution, size = 2 L - 1.
template <class T>
struct TableAxis {
  T slope;
  T origin;   // (q_grid(0) + 2) * quarter
  T quarter;  // (size - 1) / 4 = - d t / d pos
  int64_t size;

  DAT_HD T shift(T pos) const { return std::isinf(pos) ? -pos : origin - quarter * pos; }
  // Whether `count` points drift by less than a cell against as many cells, rounding included:
  // point i is then between cells i - 1 and i, or i and i + 1, counted from point 0's.
  DAT_HD bool stays_near(int64_t count) const {
    return slope <= 1 && (1 - slope) * T(count - 1) < T(1 - 0x1p-8);
  }
};

template <class T>
DAT_HD TableAxis<T> table_axis(int64_t size, int64_t L, Version version) {
  const double quarter = double(size - 1) / 4;
  double step, first;
  if (version == Version::dat) {
    step = 2.0 / double(L);
    first = 1.0 / double(L) - 1;
  } else {
    step = L > 1 ? 2.0 / double(L - 1) : 0.0;
    first = L > 1 ? -1.0 : 0.0;
  }
  const double slope = size == 2 * L - 1 && L > 1 && version == Version::datpp ? 1 : quarter * step;
  return {T(slope), T(quarter * (first + 2)), T(quarter), size};
}

}  // namespace DAT_SIMD
}  // namespace dat
