// Small matrix products on tiles that lie in cache: the arithmetic of attention.
//
//   c[i][x] (+)= sum over k of a[i, k] * b[k][x]
//
// a is read one value at a time and broadcast, b and c by vectors along x. A block of c stays in
// registers while k runs. Strides are compile-time constants wherever the caller's are, since the
// function is inlined: the broadcasts then need no address arithmetic.
#pragma once

#include <algorithm>

#include "vec.h"

namespace dat::cpu::DAT_SIMD {

// Rows and vectors of a register block: as many accumulators as the register file holds beside the
// operands (32 registers on AVX-512 and NEON, 16 on AVX2 and SSE2).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 6, kBlockVectors = 4, kTallRows = 12;
#else
constexpr int kBlockRows = 6, kBlockVectors = 2, kTallRows = 6;
#endif
constexpr int kTallVectors = 2;
// A last vector of which half or more would be idle has so many lanes. Half a vector of AVX-512
// takes half the time where the units are 256 bits wide, and no more than a whole one elsewhere.
template <class T>
constexpr int kTailLanes = DAT_VECTOR_BYTES == 64 ? kLanes<T> / 2 : kLanes<T>;

// Lines of memory that will be wanted soon, fetched a few at a time while products run: at small
// problems reading and writing the tensors would else take as long as the arithmetic.
class Prefetch {
 public:
  void clear() { regions_ = current_ = 0, at_ = end_ = nullptr; }
  // `count` pieces of `bytes` each, `stride` bytes apart; and that `times`, `step` bytes apart.
  void add(const void* start, int64_t bytes, int64_t count, int64_t stride, int64_t times = 1,
           int64_t step = 0) {
    if (regions_ == kRegions) return;
    if (bytes == stride) bytes *= count, count = 1;
    region_[regions_++] = {static_cast<const char*>(start), bytes, count, stride, times, step, 0};
  }
  // Next lines, about as many as arrive during one register block of a product.
  void step() {
    for (int64_t lines = kLines; lines > 0;) {
      if (at_ >= end_ && !next_piece()) return;
      const char* stop = std::min(end_, at_ + lines * kLineBytes);
      for (; at_ < stop; at_ += kLineBytes, --lines) __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  static constexpr int kRegions = 8, kLines = 20, kLineBytes = 64;
  struct Region {
    const char* start;
    int64_t bytes, count, stride, times, step, piece;
  };
  bool next_piece() {
    for (; current_ < regions_; ++current_) {
      Region& r = region_[current_];
      if (r.piece == r.count) r.piece = 0, --r.times, r.start += r.step;
      if (r.times <= 0 || r.count == 0) continue;
      at_ = r.start + r.piece++ * r.stride, end_ = at_ + r.bytes;
      at_ -= uintptr_t(at_) % kLineBytes;
      return true;
    }
    return false;
  }
  Region region_[kRegions];
  int regions_ = 0, current_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;  // of the piece that is on its way
};

// One operand: element (i, k) at data[i * row + k * column].
template <class T>
struct Operand {
  const T* data;
  int64_t row, column;
};

// `top`, if not null, collects the largest value of each column.
template <int I, int X, int L, class T>
DAT_INLINE void gemm_block(bool accumulate, int depth, Operand<T> a, const T* b, int64_t ldb, T* c,
                           int64_t ldc, T* top) {
  using V = Vec<T, L>;
  V sum[I][X];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) sum[i][x] = V{};
  for (int k = 0; k < depth; ++k) {
    V bk[X];
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) bk[x] = load_as<V>(b + k * ldb + x * L);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const V aik = splat_as<V>(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) sum[i][x] += aik * bk[x];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) {
      // Added last: loads before the products would be waited for.
      if (accumulate) sum[i][x] += load_as<V>(c + i * ldc + x * L);
      store(c + i * ldc + x * L, sum[i][x]);
    }
  if (!top) return;
#pragma GCC unroll 4
  for (int x = 0; x < X; ++x) {
    V largest = load_as<V>(top + x * L);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) largest = maximum(largest, sum[i][x]);
    store(top + x * L, largest);
  }
}

// Part `index` of `total` split evenly into `parts`: where it starts (part parts is the end).
DAT_INLINE int split_point(int total, int parts, int index) {
  return int(int64_t(total) * index / parts);
}

template <int I, int X, int L, class T>
DAT_INLINE void gemm_rows(bool accumulate, int rows, int depth, Operand<T> a, const T* b,
                          int64_t ldb, T* c, int64_t ldc, T* top) {
  if (rows == I) {
    gemm_block<I, X, L>(accumulate, depth, a, b, ldb, c, ldc, top);
  } else if constexpr (I > 1) {
    gemm_rows<I - 1, X, L>(accumulate, rows, depth, a, b, ldb, c, ldc, top);
  }
}

template <int I, int X, int L, class T>
DAT_INLINE void gemm_columns(bool accumulate, int rows, int vectors, int depth, Operand<T> a,
                             const T* b, int64_t ldb, T* c, int64_t ldc, T* top,
                             Prefetch* prefetch) {
  if (vectors == X) {
    const int parts = (rows + I - 1) / I;
    for (int part = 0; part < parts; ++part) {
      const int i = split_point(rows, parts, part), end = split_point(rows, parts, part + 1);
      const Operand<T> ai = {a.data + i * a.row, a.row, a.column};
      gemm_rows<I, X, L>(accumulate, end - i, depth, ai, b, ldb, c + i * ldc, ldc, top);
      if (prefetch) prefetch->step();
    }
  } else if constexpr (X > 1) {
    gemm_columns<I, X - 1, L>(accumulate, rows, vectors, depth, a, b, ldb, c, ldc, top, prefetch);
  }
}

// c: rows x columns; a: rows x depth; b: depth x columns; columns rounded up to kTailLanes.
template <int I, int X, class T>
DAT_INLINE void gemm(bool accumulate, int rows, int columns, int depth, Operand<T> a, const T* b,
                     int64_t ldb, T* c, int64_t ldc, T* top = nullptr,
                     Prefetch* prefetch = nullptr) {
  constexpr int L = kLanes<T>, kTail = kTailLanes<T>;
  const int tails = (columns + kTail - 1) / kTail, vectors = tails / (L / kTail);
  const int parts = (vectors + X - 1) / X;
  for (int part = 0; part < parts; ++part) {
    const int x = split_point(vectors, parts, part) * L;
    const int end = split_point(vectors, parts, part + 1) * L;
    gemm_columns<I, X, L>(accumulate, rows, (end - x) / L, depth, a, b + x, ldb, c + x, ldc,
                          top ? top + x : nullptr, prefetch);
  }
  if (const int x = vectors * L; x < tails * kTail)
    gemm_columns<2 * I, 1, kTail>(accumulate, rows, 1, depth, a, b + x, ldb, c + x, ldc,
                                  top ? top + x : nullptr, prefetch);
}

}  // namespace dat::cpu::DAT_SIMD
