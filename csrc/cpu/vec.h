// Vectors of the widest width the instruction set at hand has, as GCC/Clang vector extensions: one
// source for AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../math/softmax.h"

#if defined(__AVX512F__)
#define DAT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DAT_VECTOR_BYTES 32
#else
#define DAT_VECTOR_BYTES 16
#endif

#define DAT_INLINE inline __attribute__((always_inline))

namespace dat::cpu::DAT_SIMD {

template <class T>
constexpr int kLanes = DAT_VECTOR_BYTES / int(sizeof(T));

template <class T>
using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T, int L>
struct VecTypes {
  typedef T vec __attribute__((vector_size(L * sizeof(T))));
  typedef Int<T> ivec __attribute__((vector_size(L * sizeof(T))));
};
// Of the widest width, or of L lanes.
template <class T, int L = kLanes<T>>
using Vec = typename VecTypes<T, L>::vec;
template <class T, int L = kLanes<T>>
using IVec = typename VecTypes<T, L>::ivec;

template <class V, class T>
DAT_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
DAT_INLINE Vec<T> load(const T* p) {
  return load_as<Vec<T>>(p);
}
template <class T, class V>
DAT_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
template <class V, class T>
DAT_INLINE V splat_as(T x) {
  return x - V{};
}
template <class T>
DAT_INLINE Vec<T> splat(T x) {
  return splat_as<Vec<T>>(x);
}
template <class T, int L = kLanes<T>>
DAT_INLINE IVec<T, L> lane_index() {
  IVec<T, L> v;
  for (int i = 0; i < L; ++i) v[i] = i;
  return v;
}
// The larger; where either is NaN, a.
template <class V>
DAT_INLINE V maximum(V a, V b) {
  return b > a ? b : a;
}
template <class T>
DAT_INLINE Vec<T> absolute(Vec<T> x) {
  return (Vec<T>)((IVec<T>)x & std::numeric_limits<Int<T>>::max());
}
// By halves: additions one after the other would wait for each other.
template <class T, int L = kLanes<T>>
DAT_INLINE T lane_sum(Vec<T, L> v) {
  if constexpr (L == 2) {
    return v[0] + v[1];
  } else {
    Vec<T, L / 2> halves[2];
    std::memcpy(halves, &v, sizeof v);
    return lane_sum<T, L / 2>(halves[0] + halves[1]);
  }
}

// Lane i of the concatenation of a and b at index[i], 0 <= index < 2 * lanes.
template <class T>
DAT_INLINE Vec<T> permute2(Vec<T> a, Vec<T> b, IVec<T> index) {
#if defined(__clang__)
  T both[2 * kLanes<T>];
  store(both, a), store(both + kLanes<T>, b);
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = both[index[i]];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// 2^x for x <= about 127 (float), 1023 (double); 0 below the normal range; NaN stays NaN.
template <class T>
DAT_INLINE Vec<T> exp2(Vec<T> x) {
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr Int<T> kBias = sizeof(T) == 4 ? 127 : 1023;
  // Adding this rounds to an integer, whose biased form is left in the low bits.
  constexpr T kMagic = T(Int<T>(3) << (kMantissa - 1)) + kBias;
  x = maximum(x, splat(T(-kBias)));
  const Vec<T> rounded = x + kMagic;
  const IVec<T> power = (IVec<T>)rounded << kMantissa;
  return exp2_fraction<T>(x - (rounded - kMagic)) * (Vec<T>)power;
}

// log2(x) for normal x > 0; NaN stays NaN, 0 and infinity do not matter here.
template <class T>
DAT_INLINE Vec<T> log2(Vec<T> x) {
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr Int<T> kRootHalf = sizeof(T) == 4 ? Int<T>(0x3f3504f3) : Int<T>(0x3fe6a09e667f3bcd);
  // Exponent that leaves a mantissa in [sqrt(1/2), sqrt(2)).
  const IVec<T> power = ((IVec<T>)x - kRootHalf) >> kMantissa;
  const Vec<T> mantissa = (Vec<T>)((IVec<T>)x - (power << kMantissa));
  const Vec<T> z = (mantissa - T(1)) / (mantissa + T(1));
  return __builtin_convertvector(power, Vec<T>) + log2_ratio<T>(z);
}

#if !defined(__clang__)
// Exchanges, between rows that are Half apart, the lanes whose index differs in bit Half.
template <int Half, class T>
DAT_INLINE void exchange_lanes(Vec<T>* rows) {
  constexpr int L = kLanes<T>;
  struct Lanes {
    Int<T> even[L], odd[L];
    constexpr Lanes() : even(), odd() {
      for (int i = 0; i < L; ++i) {
        even[i] = i & Half ? L + i - Half : i;
        odd[i] = i & Half ? L + i : i + Half;
      }
    }
  };
  static constexpr Lanes lanes;
  const auto even = load_as<IVec<T>>(lanes.even), odd = load_as<IVec<T>>(lanes.odd);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & Half) continue;
    const Vec<T> a = rows[i], b = rows[i + Half];
    rows[i] = __builtin_shuffle(a, b, even);
    rows[i + Half] = __builtin_shuffle(a, b, odd);
  }
}
#endif

// Transposes a block of lanes x lanes: to(j)[i] = scale[j] * from(i)[j].
template <class T, class From, class To>
DAT_INLINE void transpose_block(const From& from, const To& to, Vec<T> scale) {
  constexpr int L = kLanes<T>;
  Vec<T> rows[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) rows[i] = load(from(i)) * scale;
#if defined(__clang__)
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) to(j)[i] = rows[i][j];
#else
  exchange_lanes<1, T>(rows);
  if constexpr (L > 2) exchange_lanes<2, T>(rows);
  if constexpr (L > 4) exchange_lanes<4, T>(rows);
  if constexpr (L > 8) exchange_lanes<8, T>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(to(i), rows[i]);
#endif
}
template <class T>
DAT_INLINE void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  transpose_block<T>([=](int i) { return from + i * from_stride; },
                     [=](int j) { return to + j * to_stride; }, splat(T(1)));
}

}  // namespace dat::cpu::DAT_SIMD
